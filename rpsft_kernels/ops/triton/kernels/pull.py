"""Phase 3: ``P = scale * U C``, the small product before the gradient; P replaces T in its workspace's layout."""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns as f
from .tile import address, dot_parts, extent, open_tile, part, read_tile, row_of, strides


@triton.jit
def pull_kernel(
    table,
    starts,
    runs,
    order,
    scales,
    BASIS_TYPE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    DRIFT_ALIGNED: tl.constexpr,
    BASIS_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """TRANSPOSED: the shorter side is W's columns, P = scale * V C^T. BASIS_PARTS: of U, of C and of P alike."""
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        scale = tl.load(scales + tl.load(fields + f.NUMBER))
        left = address(fields + f.LEFT, BASIS_TYPE, ALIGNED)
        left_row, left_col = strides(fields + f.LEFT_ROW, BASIS_TYPE, False, ALIGNED)
        drift = address(fields + f.DRIFT, tl.float32, DRIFT_ALIGNED)
        square = extent(fields + f.RANK, tl.float32, DRIFT_ALIGNED)
        if TRANSPOSED:
            drift_row, drift_col = 1, square
        else:
            drift_row, drift_col = square, 1
        planes = address(fields + f.PLANES, tl.bfloat16, True)
        planes_row = extent(fields + f.PLANES_ROW, tl.bfloat16, True)
        planes_part = planes_row * tl.load(fields + f.PLANES_ROWS)
        rows = tl.load(fields + f.ROWS)
        rank = extent(fields + f.RANK, BASIS_TYPE, ALIGNED and not DESCRIPTOR)
        left_tiles = open_tile(left, rows, rank, left_row, left_col, BLOCK_M, BLOCK_K, False, DESCRIPTOR)
        # Every tile of the padded planes is written: what lies beyond the extents becomes zero, not garbage.
        tiles_n = (planes_row // BLOCK_N).to(tl.int32)

        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            tile = tl.load(order + at)
            row = (tile // tiles_n).to(tl.int64) * BLOCK_M
            col = (tile % tiles_n).to(tl.int64) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for k in range(0, rank, BLOCK_K):
                u = read_tile(
                    left_tiles, row, k, rows, rank, left_row, left_col,
                    BLOCK_M, BLOCK_K, False, DESCRIPTOR, EVEN,
                )  # fmt: skip
                c = read_tile(
                    drift, k, col, square, square, drift_row, drift_col,
                    BLOCK_K, BLOCK_N, TRANSPOSED, False, EVEN,
                )  # fmt: skip
                acc = dot_parts(u, c, acc, BASIS_PARTS, BASIS_PARTS)
            acc *= scale
            r = row + tl.arange(0, BLOCK_M)
            c = col + tl.arange(0, BLOCK_N)
            target = planes + (r[:, None] * planes_row + c[None, :])
            for p in tl.static_range(BASIS_PARTS):
                tl.store(target + p * planes_part, part(acc, p))
