"""Phase 1 on Hopper: ``T = (W - W0) V`` or ``T = W V`` for aligned weights and bases in bfloat16.

The drift is formed in registers, which the tensor cores read it from. See ``hopper`` for how a program is divided, and
``project`` for the arithmetic, which is the same.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hp
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import columns as f
from .hopper import (
    CONSUMER_REGISTERS,
    HALF,
    PRODUCER_REGISTERS,
    accumulator,
    address,
    advance,
    barriers,
    describe,
    open_planes,
    ring,
    row_of,
    tma_load,
    wait_for_loads,
)


@gluon.jit
def _divide(fields, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr):
    """Tiles across, tiles of one stretch of columns, and the columns of a stretch.

    Tiles are numbered row after row, stretch after stretch.
    """
    tiles_n = (gl.load(fields + f.PLANES_ROW) // BLOCK_N).to(gl.int32)
    tiles = (gl.load(fields + f.PLANES_ROWS) // (2 * HALF)).to(gl.int32) * tiles_n
    stretches = gl.load(fields + f.STRETCHES).to(gl.int32)
    length = gl.cdiv(gl.cdiv(gl.load(fields + f.COLS).to(gl.int32), BLOCK_K), stretches) * BLOCK_K
    return tiles_n, tiles, length


@gluon.jit
def _produce(
    schedule,
    rings,
    WEIGHT_TYPE: gl.constexpr,
    BASE_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    table, starts, runs, order = schedule
    weights, pretrained, rights, full, empty = rings
    WEIGHT_BITS: gl.constexpr = WEIGHT_TYPE.primitive_bitwidth
    BASE_BITS: gl.constexpr = 0 if BASE_TYPE is None else BASE_TYPE.primitive_bitwidth
    STEP_BYTES: gl.constexpr = BLOCK_K * (2 * HALF * (WEIGHT_BITS + BASE_BITS) + BLOCK_N * 16) // 8
    # A block of a matrix that lies transposed is (BLOCK_K, HALF) in memory.
    DOWN: gl.constexpr = BLOCK_K if ROWS_CONTIGUOUS else HALF
    ACROSS: gl.constexpr = HALF if ROWS_CONTIGUOUS else BLOCK_K
    pid = gl.program_id(0)
    slot, phase = 0, 0
    for run in range(gl.load(starts + pid), gl.load(starts + pid + 1)):
        fields = row_of(table, gl.load(runs + 3 * run))
        rows, cols, rank = gl.load(fields + f.ROWS), gl.load(fields + f.COLS), gl.load(fields + f.RANK)
        if ROWS_CONTIGUOUS:
            height, width = cols, rows
            weight_stride, base_stride = gl.load(fields + f.WEIGHT_COL), gl.load(fields + f.BASE_COL)
        else:
            height, width = rows, cols
            weight_stride, base_stride = gl.load(fields + f.WEIGHT_ROW), gl.load(fields + f.BASE_ROW)
        wait_for_loads(full, slot, phase, STAGES)
        weight_blocks = describe(
            address(fields + f.WEIGHT, WEIGHT_TYPE), height, width, weight_stride, DOWN, ACROSS, WEIGHT_TYPE
        )
        if BASE_TYPE is not None:
            base_blocks = describe(
                address(fields + f.BASE, BASE_TYPE), height, width, base_stride, DOWN, ACROSS, BASE_TYPE
            )
        right_blocks = describe(
            address(fields + f.RIGHT, gl.bfloat16),
            cols,
            rank,
            gl.load(fields + f.RIGHT_ROW),
            BLOCK_K,
            BLOCK_N,
            gl.bfloat16,
        )
        tiles_n, tiles, length = _divide(fields, BLOCK_N, BLOCK_K)
        for at in range(gl.load(runs + 3 * run + 1), gl.load(runs + 3 * run + 2)):
            tile = gl.load(order + at)
            row = tile % tiles // tiles_n * (2 * HALF)
            col = tile % tiles_n * BLOCK_N
            begin = tile // tiles * length
            for k in range(begin, min(begin + length, cols.to(gl.int32)), BLOCK_K):
                landed = full.index(slot)
                # The first round passes at once.
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(landed, STEP_BYTES)
                for half in gl.static_range(2):
                    at_row = row + half * HALF
                    place = [k, at_row] if ROWS_CONTIGUOUS else [at_row, k]
                    tma_load(weight_blocks, place, landed, weights.index(slot * 2 + half))
                    if BASE_TYPE is not None:
                        tma_load(base_blocks, place, landed, pretrained.index(slot * 2 + half))
                tma_load(right_blocks, [k, col], landed, rights.index(slot))
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _read(block, ROWS_CONTIGUOUS: gl.constexpr, BLOCK_N: gl.constexpr):
    """A block (HALF, BLOCK_K) as a left operand; one that lies transposed is turned on the way."""
    LAYOUT: gl.constexpr = gl.DotOperandLayout(0, accumulator(BLOCK_N), 2)
    if ROWS_CONTIGUOUS:
        return block.permute((1, 0)).load(LAYOUT)
    else:
        return block.load(LAYOUT)


@gluon.jit
def _drift(w, w0):
    """W - W0 in bfloat16, rounded once from float32; W0 as a weight of this dtype holds it."""
    return (w.to(gl.float32) - w0.to(w.dtype).to(gl.float32)).to(gl.bfloat16)


@gluon.jit
def _consume(
    schedule,
    rings,
    BASE_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    WEIGHT_PARTS: gl.constexpr,
    PLANES: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The upper or the lower rows of every tile."""
    table, starts, runs, order = schedule
    weights, pretrained, rights, full, empty = rings
    LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    pid = gl.program_id(0)
    slot, phase = 0, 0
    for run in range(gl.load(starts + pid), gl.load(starts + pid + 1)):
        fields = row_of(table, gl.load(runs + 3 * run))
        planes, planes_row = open_planes(fields)
        planes_part = planes_row * gl.load(fields + f.PLANES_ROWS)
        cols = gl.load(fields + f.COLS).to(gl.int32)
        tiles_n, tiles, length = _divide(fields, BLOCK_N, BLOCK_K)
        for at in range(gl.load(runs + 3 * run + 1), gl.load(runs + 3 * run + 2)):
            tile = gl.load(order + at)
            acc = gl.zeros((HALF, BLOCK_N), gl.float32, LAYOUT)
            begin = tile // tiles * length
            for _ in range(begin, min(begin + length, cols), BLOCK_K):
                mbarrier.wait(full.index(slot), phase)
                w = _read(weights.index(slot * 2 + CONSUMER), ROWS_CONTIGUOUS, BLOCK_N)
                v = rights.index(slot)
                # A product reads its left operand from registers until it has been waited for, so every one is waited
                # for before the next block is read: the other consumer's products fill the gap.
                if BASE_TYPE is not None:
                    a = _drift(w, _read(pretrained.index(slot * 2 + CONSUMER), ROWS_CONTIGUOUS, BLOCK_N))
                    acc = hp.warpgroup_mma(a, v, acc, is_async=True)
                    acc = hp.warpgroup_mma_wait(0, deps=(acc,))
                elif WEIGHT_PARTS == 1:
                    acc = hp.warpgroup_mma(w, v, acc, is_async=True)
                    acc = hp.warpgroup_mma_wait(0, deps=(acc,))
                else:
                    gl.static_assert(WEIGHT_PARTS == 2)
                    large = w.to(gl.bfloat16)
                    small = (w.to(gl.float32) - large.to(gl.float32)).to(gl.bfloat16)
                    # The smaller part first, so that it is not lost against the larger.
                    acc = hp.warpgroup_mma(small, v, acc, is_async=True)
                    acc = hp.warpgroup_mma_wait(0, deps=(acc,))
                    acc = hp.warpgroup_mma(large, v, acc, is_async=True)
                    acc = hp.warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(slot), count=1)
                slot, phase = advance(slot, phase, STAGES)
            # The planes are padded to whole tiles: no mask.
            row = (tile % tiles // tiles_n).to(gl.int64) * (2 * HALF) + CONSUMER * HALF
            col = (tile % tiles_n).to(gl.int64) * BLOCK_N
            r = row + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
            c = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
            target = planes + (tile // tiles).to(gl.int64) * PLANES * planes_part
            target += r[:, None] * planes_row + c[None, :]
            for p in gl.static_range(PLANES):
                part = acc.to(gl.bfloat16)
                gl.store(target + p * planes_part, part)
                acc -= part.to(gl.float32)


@gluon.jit
def hopper_project_kernel(
    table,
    starts,
    runs,
    order,
    WEIGHT_TYPE: gl.constexpr,
    BASE_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    WEIGHT_PARTS: gl.constexpr,
    PLANES: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program walks its runs of tiles (BLOCK_M, BLOCK_N); a run is a stretch of ``order`` within one weight.

    ROWS_CONTIGUOUS: W entered transposed, its memory is contiguous along the kernel's rows.
    """
    gl.static_assert(BLOCK_M == 2 * HALF)
    DOWN: gl.constexpr = BLOCK_K if ROWS_CONTIGUOUS else HALF
    ACROSS: gl.constexpr = HALF if ROWS_CONTIGUOUS else BLOCK_K
    weights = ring(2 * STAGES, DOWN, ACROSS, WEIGHT_TYPE)
    pretrained = weights if BASE_TYPE is None else ring(2 * STAGES, DOWN, ACROSS, BASE_TYPE)
    rights = ring(STAGES, BLOCK_K, BLOCK_N, gl.bfloat16)
    rings = (weights, pretrained, rights, barriers(STAGES, 1), barriers(STAGES, 2))
    schedule = (table, starts, runs, order)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    schedule,
                    rings,
                    BASE_TYPE,
                    ROWS_CONTIGUOUS,
                    WEIGHT_PARTS,
                    PLANES,
                    gl.constexpr(0),
                    BLOCK_N,
                    BLOCK_K,
                    STAGES,
                ),
            ),
            (
                _consume,
                (
                    schedule,
                    rings,
                    BASE_TYPE,
                    ROWS_CONTIGUOUS,
                    WEIGHT_PARTS,
                    PLANES,
                    gl.constexpr(1),
                    BLOCK_N,
                    BLOCK_K,
                    STAGES,
                ),
            ),
            (_produce, (schedule, rings, WEIGHT_TYPE, BASE_TYPE, ROWS_CONTIGUOUS, BLOCK_N, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
