"""The self-test: backends are tested where they are installed, with the kernels that serve the device at hand.

========== =====================================================================================================
cases      the cases: forms, dtypes, layouts, orientations, classes of ranks
inputs     the numbers: random ones, and ones whose results are exact in any order of summation
exact      results in float64, and how far rounding may take others from them
checks     one case: against float64, bit for bit where that is due, zero at the anchor, NaN, the same bits again
suite      all cases on one subject: failures, and the kernels that were launched
subjects   the runs that a device allows: backends, instruction sets, and the cases for each
report     the table of a run
command    ``python -m rpsft_kernels selftest``
record     the file that says which kernels have passed on which device
gate       the quick part, which runs by itself before the first launch on a device without such a record
========== =====================================================================================================

Backends are called directly and not through the registered operators, because those ask ``gate`` first.
"""
