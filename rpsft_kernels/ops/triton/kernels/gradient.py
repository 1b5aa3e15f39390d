"""Phase 4: ``G = P V^T`` or ``G += P V^T``, accumulated in float32 and rounded once to the gradient's own dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from . import columns as f
from .tile import address, dot_parts, extent, narrow, open_tile, read_tile, row_of, strides


@triton.jit
def gradient_kernel(
    table,
    starts,
    runs,
    order,
    GRAD_TYPE: tl.constexpr,
    BASIS_TYPE: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,
    ALIGNED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
    GRAD_ALIGNED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BASIS_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile (BLOCK_M, BLOCK_N) of G as it lies in memory.

    ROWS_CONTIGUOUS: G's memory is contiguous along the kernel's rows, so its tiles are those of G^T = V P^T.
    """
    pid = tl.program_id(0)
    for run in range(tl.load(starts + pid), tl.load(starts + pid + 1)):
        fields = row_of(table, tl.load(runs + 3 * run))
        right = address(fields + f.RIGHT, BASIS_TYPE, ALIGNED)
        right_row, right_col = strides(fields + f.RIGHT_ROW, BASIS_TYPE, False, ALIGNED)
        planes = address(fields + f.PLANES, tl.bfloat16, True)
        planes_row = extent(fields + f.PLANES_ROW, tl.bfloat16, True)
        planes_rows = tl.load(fields + f.PLANES_ROWS)
        rank = extent(fields + f.RANK, BASIS_TYPE, ALIGNED and not DESCRIPTOR)
        grad = address(fields + f.GRAD, GRAD_TYPE, GRAD_ALIGNED)
        grad_row, grad_col = strides(fields + f.GRAD_ROW, GRAD_TYPE, ROWS_CONTIGUOUS, GRAD_ALIGNED)
        if ROWS_CONTIGUOUS:
            height = tl.load(fields + f.COLS)
            width = extent(fields + f.ROWS, GRAD_TYPE, GRAD_ALIGNED)
            down, across = grad_col, grad_row
            right_tiles = open_tile(right, height, rank, right_row, right_col, BLOCK_M, BLOCK_K, False, DESCRIPTOR)
            planes_tiles = open_tile(
                planes, planes_row, planes_rows * BASIS_PARTS, 1, planes_row, BLOCK_K, BLOCK_N, True, DESCRIPTOR
            )
        else:
            height = tl.load(fields + f.ROWS)
            width = extent(fields + f.COLS, GRAD_TYPE, GRAD_ALIGNED)
            down, across = grad_row, grad_col
            right_tiles = open_tile(right, rank, width, right_col, right_row, BLOCK_K, BLOCK_N, True, DESCRIPTOR)
            planes_tiles = open_tile(
                planes, planes_rows * BASIS_PARTS, planes_row, planes_row, 1, BLOCK_M, BLOCK_K, False, DESCRIPTOR
            )
        tiles_n = tl.cdiv(width, BLOCK_N).to(tl.int32)

        for at in range(tl.load(runs + 3 * run + 1), tl.load(runs + 3 * run + 2)):
            tile = tl.load(order + at)
            row = (tile // tiles_n).to(tl.int64) * BLOCK_M
            col = (tile % tiles_n).to(tl.int64) * BLOCK_N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            # The smallest part of P first, so that it is not lost against the largest.
            for back in tl.static_range(BASIS_PARTS):
                for k in range(0, rank, BLOCK_K):
                    if ROWS_CONTIGUOUS:
                        v = read_tile(
                            right_tiles, row, k, height, rank, right_row, right_col,
                            BLOCK_M, BLOCK_K, False, DESCRIPTOR, EVEN,
                        )  # fmt: skip
                        p = read_tile(
                            planes_tiles, k, (BASIS_PARTS - 1 - back) * planes_rows + col,
                            planes_row, planes_rows, 1, planes_row, BLOCK_K, BLOCK_N, True, DESCRIPTOR, True,
                        )  # fmt: skip
                        acc = dot_parts(v, p, acc, back + 1, 1)
                    else:
                        p = read_tile(
                            planes_tiles, (BASIS_PARTS - 1 - back) * planes_rows + row, k,
                            planes_rows, planes_row, planes_row, 1, BLOCK_M, BLOCK_K, False, DESCRIPTOR, True,
                        )  # fmt: skip
                        v = read_tile(
                            right_tiles, k, col, rank, width, right_col, right_row,
                            BLOCK_K, BLOCK_N, True, DESCRIPTOR, EVEN,
                        )  # fmt: skip
                        acc = dot_parts(p, v, acc, 1, back + 1)
            r = row + tl.arange(0, BLOCK_M)
            c = col + tl.arange(0, BLOCK_N)
            target = grad + (r[:, None] * down + c[None, :] * across)
            if EVEN:
                if ACCUMULATE:
                    acc += tl.load(target).to(tl.float32)
                tl.store(target, narrow(acc, GRAD_TYPE))
            else:
                mask = (r[:, None] < height) & (c[None, :] < width)
                if ACCUMULATE:
                    acc += tl.load(target, mask=mask, other=0.0).to(tl.float32)
                tl.store(target, narrow(acc, GRAD_TYPE), mask=mask)
