"""Full anchors (rank >= min(m, n)): ``||W - W0||_F^2`` and its gradient, one elementwise pass each."""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns as f
from .tile import address, extent, inlined, narrow, read_tile, row_of, strides


@inlined
def moved_tile(
    fields,
    row,
    col,
    rows,
    cols,
    WEIGHT_TYPE: tl.constexpr,
    BASE_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A tile of ``W - W0`` in float32, zero beyond the extents."""
    weight = address(fields + f.WEIGHT, WEIGHT_TYPE, ALIGNED)
    weight_row, weight_col = strides(fields + f.WEIGHT_ROW, WEIGHT_TYPE, False, ALIGNED)
    base = address(fields + f.BASE, BASE_TYPE, ALIGNED)
    base_row, base_col = strides(fields + f.BASE_ROW, BASE_TYPE, False, ALIGNED)
    w = read_tile(weight, row, col, rows, cols, weight_row, weight_col, BLOCK_M, BLOCK_N, False, False, False)
    w0 = read_tile(base, row, col, rows, cols, base_row, base_col, BLOCK_M, BLOCK_N, False, False, False)
    return w.to(tl.float32) - narrow(w0, WEIGHT_TYPE).to(tl.float32)


@triton.jit
def full_drift_kernel(
    table,
    starts,
    runs,
    order,
    squares,
    WEIGHT_TYPE: tl.constexpr,
    BASE_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of squares of each tile of ``W - W0``."""
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        rows = tl.load(fields + f.ROWS)
        cols = extent(fields + f.COLS, tl.bfloat16, ALIGNED)
        slots = squares + tl.load(fields + f.SQUARES)
        tiles_n = tl.cdiv(cols, BLOCK_N).to(tl.int32)
        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            tile = tl.load(order + at)
            row = (tile // tiles_n).to(tl.int64) * BLOCK_M
            col = (tile % tiles_n).to(tl.int64) * BLOCK_N
            moved = moved_tile(fields, row, col, rows, cols, WEIGHT_TYPE, BASE_TYPE, ALIGNED, BLOCK_M, BLOCK_N)
            tl.store(slots + tile, tl.sum(moved * moved))


@triton.jit
def full_gradient_kernel(
    table,
    starts,
    runs,
    order,
    scales,
    WEIGHT_TYPE: tl.constexpr,
    BASE_TYPE: tl.constexpr,
    GRAD_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``G = scale * (W - W0)`` or ``G += scale * (W - W0)``."""
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        scale = tl.load(scales + tl.load(fields + f.NUMBER))
        rows = tl.load(fields + f.ROWS)
        cols = extent(fields + f.COLS, tl.bfloat16, ALIGNED)
        grad = address(fields + f.GRAD, GRAD_TYPE, ALIGNED)
        grad_row, grad_col = strides(fields + f.GRAD_ROW, GRAD_TYPE, False, ALIGNED)
        tiles_n = tl.cdiv(cols, BLOCK_N).to(tl.int32)
        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            tile = tl.load(order + at)
            row = (tile // tiles_n).to(tl.int64) * BLOCK_M
            col = (tile % tiles_n).to(tl.int64) * BLOCK_N
            moved = moved_tile(fields, row, col, rows, cols, WEIGHT_TYPE, BASE_TYPE, ALIGNED, BLOCK_M, BLOCK_N)
            r = row + tl.arange(0, BLOCK_M)
            c = col + tl.arange(0, BLOCK_N)
            target = grad + (r[:, None] * grad_row + c[None, :] * grad_col)
            mask = (r[:, None] < rows) & (c[None, :] < cols)
            value = scale * moved
            if ACCUMULATE:
                value += tl.load(target, mask=mask, other=0.0).to(tl.float32)
            tl.store(target, narrow(value, GRAD_TYPE), mask=mask)
