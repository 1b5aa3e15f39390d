"""C in bfloat16, beside C itself: the form in which ``hopper_pull`` reads it, again and again, as its first part."""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns as f
from .tile import address, narrow, row_of


@triton.jit
def round_kernel(table, starts, runs, order, BLOCK: tl.constexpr):
    """One tile is BLOCK elements of C, row after row; the rows of the rounded C are padded to 16 bytes."""
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        drift = address(fields + f.DRIFT, tl.float32, True)
        rounded = address(fields + f.ROUNDED, tl.bfloat16, True)
        # C is aligned where it is rounded: its rows are of whole 16 bytes.
        rank = tl.multiple_of(tl.load(fields + f.RANK).to(tl.int32), 4)
        row = tl.multiple_of(tl.load(fields + f.ROUNDED_ROW).to(tl.int32), 8)
        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            element = tl.load(order + at) * BLOCK + tl.arange(0, BLOCK)
            mask = element < rank * rank
            c = tl.load(drift + element, mask=mask, other=0.0)
            tl.store(rounded + (element // rank * row + element % rank), narrow(c, tl.bfloat16), mask=mask)
