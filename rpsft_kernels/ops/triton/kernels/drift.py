"""Phase 2: ``C = U^T T`` or ``C = U^T T - B`` with ``||C||_F^2`` per tile, in float32.

Tiles too few to fill a GPU are split along the rows of T: the stretches' sums go to a workspace, and
``reduce_kernel`` adds them in a fixed order. How often a weight is split depends on its shape alone, so that
its bits do not depend on its neighbours.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns as f
from .tile import address, dot_parts, extent, inlined, open_tile, read_tile, row_of, strides


@inlined
def finish_tile(
    acc,
    fields,
    row,
    col,
    rank,
    TRANSPOSED: tl.constexpr,
    HAS_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    DRIFT_ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Subtract the tile of B, store the tile of C, return its sum of squares; C and B lie untransposed in memory."""
    drift = address(fields + f.DRIFT, tl.float32, DRIFT_ALIGNED)
    if TRANSPOSED:
        acc = tl.trans(acc)
        r = col + tl.arange(0, BLOCK_N)
        c = row + tl.arange(0, BLOCK_M)
    else:
        r = row + tl.arange(0, BLOCK_M)
        c = col + tl.arange(0, BLOCK_N)
    # k * k elements: 32-bit offsets are enough, and spare registers.
    offsets = (r[:, None] * rank + c[None, :]).to(tl.int32)
    mask = (r[:, None] < rank) & (c[None, :] < rank)
    if HAS_BLOCK:
        block = address(fields + f.BLOCK, tl.float32, DRIFT_ALIGNED)
        if EVEN:
            acc -= tl.load(block + offsets)
        else:
            acc -= tl.load(block + offsets, mask=mask, other=0.0)
    if EVEN:
        tl.store(drift + offsets, acc)
    else:
        tl.store(drift + offsets, acc, mask=mask)
    return tl.sum(acc * acc)


@triton.jit
def drift_kernel(
    table,
    starts,
    runs,
    order,
    squares,
    BASIS_TYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    DRIFT_ALIGNED: tl.constexpr,
    HAS_BLOCK: tl.constexpr,
    BASIS_PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """TRANSPOSED: W entered transposed, what is summed here is C^T."""
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        left = address(fields + f.LEFT, BASIS_TYPE, ALIGNED)
        left_row, left_col = strides(fields + f.LEFT_ROW, BASIS_TYPE, False, ALIGNED)
        planes = address(fields + f.PLANES, tl.bfloat16, True)
        planes_row = extent(fields + f.PLANES_ROW, tl.bfloat16, True)
        planes_rows = tl.load(fields + f.PLANES_ROWS)
        rows = tl.load(fields + f.ROWS)
        rank = extent(fields + f.RANK, BASIS_TYPE, ALIGNED and not DESCRIPTOR)
        square = extent(fields + f.RANK, tl.float32, DRIFT_ALIGNED)
        # U^T, contiguous along its rows.
        left_tiles = open_tile(left, rank, rows, left_col, left_row, BLOCK_M, BLOCK_K, True, DESCRIPTOR)
        stretches = tl.load(fields + f.STRETCHES)
        planes_tiles = open_tile(
            planes, planes_rows * PLANES * stretches, planes_row, planes_row, 1, BLOCK_K, BLOCK_N, False, DESCRIPTOR
        )
        tiles_n = tl.cdiv(rank, BLOCK_N).to(tl.int32)
        tiles = tl.cdiv(rank, BLOCK_M).to(tl.int32) * tiles_n
        splits = tl.load(fields + f.SPLITS)
        # Each stretch of W's columns has planes of its own, which are cut alike.
        row_splits = splits // stretches
        stretch = tl.cdiv(tl.cdiv(rows, BLOCK_K), row_splits) * BLOCK_K

        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            tile = tl.load(order + at)
            split = (tile // tiles).to(tl.int64)
            slot = tile % tiles
            row = (slot // tiles_n).to(tl.int64) * BLOCK_M
            col = (slot % tiles_n).to(tl.int64) * BLOCK_N
            begin = split % row_splits * stretch
            first_row = split // row_splits * PLANES * planes_rows
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # The smallest part of T first, so that it is not lost against the largest.
            for back in tl.static_range(PLANES):
                for step in range(0, tl.minimum(stretch, rows - begin), BLOCK_K):
                    k = begin + step
                    u = read_tile(
                        left_tiles, row, k, rank, rows, left_col, left_row, BLOCK_M, BLOCK_K, True, DESCRIPTOR, EVEN
                    )
                    t = read_tile(
                        planes_tiles, first_row + (PLANES - 1 - back) * planes_rows + k, col,
                        planes_rows, planes_row, planes_row, 1, BLOCK_K, BLOCK_N, False, DESCRIPTOR, True,
                    )  # fmt: skip
                    acc = dot_parts(u, t, acc, back + 1 if back + 1 < BASIS_PARTS else BASIS_PARTS, 1)
            if splits == 1:
                total = finish_tile(
                    acc, fields, row, col, square,
                    TRANSPOSED, HAS_BLOCK, EVEN, DRIFT_ALIGNED, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                tl.store(squares + tl.load(fields + f.SQUARES) + slot, total)
            else:
                partial = address(fields + f.PARTIAL, tl.float32, True)
                partial += (split * tiles + slot) * (BLOCK_M * BLOCK_N)
                r = tl.arange(0, BLOCK_M)
                c = tl.arange(0, BLOCK_N)
                tl.store(partial + r[:, None] * BLOCK_N + c[None, :], acc)


@triton.jit
def reduce_kernel(
    table,
    starts,
    runs,
    order,
    squares,
    TRANSPOSED: tl.constexpr,
    EVEN: tl.constexpr,
    DRIFT_ALIGNED: tl.constexpr,
    HAS_BLOCK: tl.constexpr,
    SLAB: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Second pass over split sums: the stretches of one tile are added in their order."""
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        rank = extent(fields + f.RANK, tl.float32, DRIFT_ALIGNED)
        tiles_n = tl.cdiv(rank, BLOCK_N).to(tl.int32)
        tiles = tl.cdiv(rank, BLOCK_M).to(tl.int32) * tiles_n
        splits = tl.load(fields + f.SPLITS)
        partial = address(fields + f.PARTIAL, tl.float32, True)
        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            slot = tl.load(order + at)
            row = (slot // tiles_n).to(tl.int64) * BLOCK_M
            col = (slot % tiles_n).to(tl.int64) * BLOCK_N
            r = tl.arange(0, SLAB)
            c = tl.arange(0, BLOCK_N)
            total = 0.0
            # Slab by slab: a whole tile in float32 and its addresses would not fit the registers.
            for top in range(0, BLOCK_M, SLAB):
                acc = tl.zeros((SLAB, BLOCK_N), tl.float32)
                for split in range(0, splits):
                    tile = partial + (split * tiles + slot) * (BLOCK_M * BLOCK_N) + top * BLOCK_N
                    acc += tl.load(tile + r[:, None] * BLOCK_N + c[None, :])
                total += finish_tile(
                    acc, fields, row + top, col, rank,
                    TRANSPOSED, HAS_BLOCK, EVEN, DRIFT_ALIGNED, SLAB, BLOCK_N,
                )  # fmt: skip
            tl.store(squares + tl.load(fields + f.SQUARES) + slot, total)


@triton.jit
def squares_kernel(table, squares, totals, BLOCK: tl.constexpr):
    """One weight per program: its tiles' sums of squares, added in a fixed order."""
    pid = tl.program_id(0)
    fields = row_of(table, pid)
    first = squares + tl.load(fields + f.SQUARES)
    slots = tl.load(fields + f.SLOTS)
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, slots, BLOCK):
        at = start + tl.arange(0, BLOCK)
        acc += tl.load(first + at, mask=at < slots, other=0.0)
    tl.store(totals + tl.load(fields + f.NUMBER), tl.sum(acc))
