"""Phase 1: ``T = (W - W0) V`` or ``T = W V``, one grouped persistent launch over a bucket of weights.

W is read once, in its own dtype. What is rounded to bfloat16 is the drift (one part) or, without W0, W and T
in as many parts as keep float32's accuracy.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns as f
from .tile import address, dot_parts, extent, narrow, open_tile, part, read_tile, row_of, strides


@triton.jit
def project_kernel(
    table,
    starts,
    runs,
    order,
    WEIGHT_TYPE: tl.constexpr,
    BASE_TYPE: tl.constexpr,
    BASIS_TYPE: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    WEIGHT_PARTS: tl.constexpr,
    BASIS_PARTS: tl.constexpr,
    PLANES: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program walks its runs of tiles; a run is a stretch of ``order`` within one weight.

    ROWS_CONTIGUOUS: W entered transposed, its memory is contiguous along the kernel's rows.
    SWAPPED: accumulate T^T, for units that want the computed operand in shared memory the way it was read.
    """
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        weight = address(fields + f.WEIGHT, WEIGHT_TYPE, ALIGNED)
        weight_row, weight_col = strides(fields + f.WEIGHT_ROW, WEIGHT_TYPE, ROWS_CONTIGUOUS, ALIGNED)
        right = address(fields + f.RIGHT, BASIS_TYPE, ALIGNED)
        right_row, right_col = strides(fields + f.RIGHT_ROW, BASIS_TYPE, False, ALIGNED)
        rows = extent(fields + f.ROWS, WEIGHT_TYPE, ALIGNED and ROWS_CONTIGUOUS and not DESCRIPTOR)
        cols = extent(fields + f.COLS, WEIGHT_TYPE, ALIGNED and not ROWS_CONTIGUOUS and not DESCRIPTOR)
        rank = extent(fields + f.RANK, BASIS_TYPE, ALIGNED and not DESCRIPTOR)
        weight_tiles = open_tile(
            weight, rows, cols, weight_row, weight_col, BLOCK_M, BLOCK_K, ROWS_CONTIGUOUS, DESCRIPTOR
        )
        right_tiles = open_tile(right, cols, rank, right_row, right_col, BLOCK_K, BLOCK_N, False, DESCRIPTOR)
        if BASE_TYPE is not None:
            base = address(fields + f.BASE, BASE_TYPE, ALIGNED)
            base_row, base_col = strides(fields + f.BASE_ROW, BASE_TYPE, ROWS_CONTIGUOUS, ALIGNED)
            base_tiles = open_tile(base, rows, cols, base_row, base_col, BLOCK_M, BLOCK_K, ROWS_CONTIGUOUS, DESCRIPTOR)
        planes = address(fields + f.PLANES, tl.bfloat16, True)
        planes_row = extent(fields + f.PLANES_ROW, tl.bfloat16, True)
        planes_part = planes_row * tl.load(fields + f.PLANES_ROWS)
        # Every tile of the padded planes is written: what lies beyond the extents becomes zero, not garbage.
        tiles_n = (planes_row // BLOCK_N).to(tl.int32)

        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            tile = tl.load(order + at)
            row = (tile // tiles_n).to(tl.int64) * BLOCK_M
            col = (tile % tiles_n).to(tl.int64) * BLOCK_N
            if SWAPPED:
                acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
            else:
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, cols, BLOCK_K):
                w = read_tile(
                    weight_tiles, row, k, rows, cols, weight_row, weight_col,
                    BLOCK_M, BLOCK_K, ROWS_CONTIGUOUS, DESCRIPTOR, EVEN,
                )  # fmt: skip
                if BASE_TYPE is not None:
                    w0 = read_tile(
                        base_tiles, row, k, rows, cols, base_row, base_col,
                        BLOCK_M, BLOCK_K, ROWS_CONTIGUOUS, DESCRIPTOR, EVEN,
                    )  # fmt: skip
                    # The base as a weight of this dtype holds it: equal to W, bit for bit, at the anchor.
                    w = w.to(tl.float32) - narrow(w0, WEIGHT_TYPE).to(tl.float32)
                v = read_tile(
                    right_tiles, k, col, cols, rank, right_row, right_col,
                    BLOCK_K, BLOCK_N, False, DESCRIPTOR, EVEN,
                )  # fmt: skip
                if SWAPPED:
                    acc = dot_parts(tl.trans(v), tl.trans(w), acc, BASIS_PARTS, WEIGHT_PARTS)
                else:
                    acc = dot_parts(w, v, acc, WEIGHT_PARTS, BASIS_PARTS)
            if SWAPPED:
                acc = tl.trans(acc)
            # The planes are padded to whole tiles: no mask.
            r = row + tl.arange(0, BLOCK_M)
            c = col + tl.arange(0, BLOCK_N)
            target = planes + (r[:, None] * planes_row + c[None, :])
            for p in tl.static_range(PLANES):
                tl.store(target + p * planes_part, part(acc, p))
