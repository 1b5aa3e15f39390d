"""The operations as grouped Triton kernels: one launch per phase over many weights of different shapes.

========== ================================== =================================================
project    ``T = (W - W0) V`` or ``W V``       read a row of the table per weight (``fields``),
drift      ``C = U^T T - B``, ``||C||^2``       walk a static schedule (``schedule``), compile one
pull       ``P = scale * U C``                 variant per layout and dtype (``variants``)
gradient   ``G (+)= P V^T``
========== ================================== =================================================

The folder, from the entry downwards:

- ``backend``: whether the kernels can serve a device, and the two operations;
- ``program``: the batches of a plan, prepared, and the run that each call uses;
- ``project_drift``, ``pull_back``, ``full_form``: plan one ``operation`` each, and prepare its launches;
- ``table``, ``fields``, ``upload``, ``scratch``: the rows that kernels read, how they reach the device, intermediates;
- ``layout``, ``schedule``: how operands lie, which program computes which tile;
- ``variants``, ``tile_table``, ``tiles/``: the compile-time choices of every kernel, listable; tile sizes per GPU;
- ``device``, ``toolchain``, ``compiler``, ``vetting``: the GPU at hand, what could compile for it, and whether that is
  known to compile correctly;
- ``launch``: the one door to a kernel: compiled ahead of time (``aot/``), else just in time (``jit``);
- ``kernels/``: the kernels themselves;
- ``machine_code/``: checks of what was compiled.

Triton is imported only where something is compiled, interpreted or disassembled (``kernels``, ``jit``, ``compiler``,
``vetting``, ``aot.build``, ``machine_code``): planning does without, and so do kernels compiled ahead of time
(``rpsft_kernels.ops.triton.aot.dispatch``).
"""
