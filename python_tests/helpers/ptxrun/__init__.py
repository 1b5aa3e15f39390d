"""Runs compiled NVIDIA PTX (as Triton emits it for sm_80 and sm_90) on the CPU, to check it without a GPU.

What runs is the compiled kernel: tile layouts, swizzles of shared memory, barriers, asynchronous copies, assumed
alignment. Reported are what a GPU would fault on and what makes a result undefined. All errors are ``PtxError`` and
name the instruction, its source line, CTA, thread and address:

* ``MemoryFault``: access out of bounds (every tensor is a region of its own, and the gaps between the rows of a strided
  one belong to nobody), misaligned, or a write to what is read-only.
* ``UninitialisedRead``: of registers, shared memory, or global memory to which nothing was written; shared memory that
  an asynchronous copy still writes.
* ``RaceError``: warps or bulk copies that touch the same shared memory, one writing, with nothing between that orders
  them (vector clocks per warp, proxy fences included); a tensor map that is replaced while a bulk copy may use it, or
  used without being acquired; CTAs of one launch that touch what another one wrote.
* ``RegisterHazard``: a register of a wgmma in flight is touched. ``wgmma_hazards`` proves of all paths that none is.
* ``PtxError`` itself: bulk copies and wgmmas that nothing waits for, an mbarrier that completes a phase while nothing
  has waited for the one before, barriers with wrong counts.
* ``Deadlock``, which tells who waits where.
* ``NotImplementedError``: an instruction is not supported. Nothing with an effect is skipped.

Asynchronous work happens as late as the program allows. What a bulk load wrote is known through its mbarrier alone, and
what a bulk store read through its thread's wait. Nothing is said about time, nor about what ptxas makes of the
PTX. CTAs run one after the other, warps in lock-step, so races inside a warp are not seen. Products of matrix
instructions are exact and their sums float32: a GPU may differ by a few float32 ulp.
"""

from .errors import Deadlock, MemoryFault, ParseError, PtxError, RaceError, RegisterHazard, UninitialisedRead
from .launch import region_of, run
from .memory import GlobalMemory
from .parser import parse
from .program import Program
from .stats import Stats

__all__ = [
    "Deadlock",
    "GlobalMemory",
    "MemoryFault",
    "ParseError",
    "Program",
    "PtxError",
    "RaceError",
    "RegisterHazard",
    "Stats",
    "UninitialisedRead",
    "parse",
    "region_of",
    "run",
]
