"""Phase 3 on Hopper: ``P = scale * U C`` for aligned bases in bfloat16, from C in bfloat16 (``round``).

Both operands come from shared memory. See ``hopper`` for how a program is divided, and ``pull`` for the arithmetic,
which is the same.
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
    step_back,
    tma_load,
    wait_for_loads,
)


@gluon.jit
def _produce(
    schedule,
    rings,
    TRANSPOSED: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    table, starts, runs, order = schedule
    lefts, rights, full, empty = rings
    # A block of C that enters transposed is (BLOCK_N, BLOCK_K) in memory.
    DOWN: gl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    ACROSS: gl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    pid = gl.program_id(0)
    slot, phase = 0, 0
    for run in range(gl.load(starts + pid), gl.load(starts + pid + 1)):
        fields = row_of(table, gl.load(runs + 3 * run))
        rank = gl.load(fields + f.RANK)
        wait_for_loads(full, slot, phase, STAGES)
        left_blocks = describe(
            address(fields + f.LEFT, gl.bfloat16),
            gl.load(fields + f.ROWS),
            rank,
            gl.load(fields + f.LEFT_ROW),
            HALF,
            BLOCK_K,
            gl.bfloat16,
        )
        drift_blocks = describe(
            address(fields + f.ROUNDED, gl.bfloat16),
            rank,
            rank,
            gl.load(fields + f.ROUNDED_ROW),
            DOWN,
            ACROSS,
            gl.bfloat16,
        )
        tiles_n = (gl.load(fields + f.PLANES_ROW) // BLOCK_N).to(gl.int32)
        sum_end = rank.to(gl.int32)
        for at in range(gl.load(runs + 3 * run + 1), gl.load(runs + 3 * run + 2)):
            tile = gl.load(order + at)
            row = tile // tiles_n * (2 * HALF)
            col = tile % tiles_n * BLOCK_N
            for k in range(0, sum_end, BLOCK_K):
                landed = full.index(slot)
                # The first round passes at once.
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(landed, 2 * BLOCK_K * (2 * HALF + BLOCK_N))
                for half in gl.static_range(2):
                    tma_load(left_blocks, [row + half * HALF, k], landed, lefts.index(slot * 2 + half))
                place = [col, k] if TRANSPOSED else [k, col]
                tma_load(drift_blocks, place, landed, rights.index(slot))
                slot, phase = advance(slot, phase, STAGES)


@gluon.jit
def _consume(
    schedule,
    scales,
    rings,
    TRANSPOSED: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The upper or the lower rows of every tile."""
    table, starts, runs, order = schedule
    lefts, rights, full, empty = rings
    LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    pid = gl.program_id(0)
    slot, phase = 0, 0
    for run in range(gl.load(starts + pid), gl.load(starts + pid + 1)):
        fields = row_of(table, gl.load(runs + 3 * run))
        scale = gl.load(scales + gl.load(fields + f.NUMBER))
        planes, planes_row = open_planes(fields)
        tiles_n = (planes_row // BLOCK_N).to(gl.int32)
        sum_end = gl.load(fields + f.RANK).to(gl.int32)
        for at in range(gl.load(runs + 3 * run + 1), gl.load(runs + 3 * run + 2)):
            tile = gl.load(order + at)
            acc = gl.zeros((HALF, BLOCK_N), gl.float32, LAYOUT)
            for k in range(0, sum_end, BLOCK_K):
                mbarrier.wait(full.index(slot), phase)
                right = rights.index(slot).permute((1, 0)) if TRANSPOSED else rights.index(slot)
                # A product is begun before the one that runs is waited for, whose slot is then free.
                acc = hp.warpgroup_mma(lefts.index(slot * 2 + CONSUMER), right, acc, use_acc=k > 0, is_async=True)
                acc = hp.warpgroup_mma_wait(1, deps=(acc,))
                mbarrier.arrive(empty.index(step_back(slot, STAGES)), count=1, pred=k > 0)
                slot, phase = advance(slot, phase, STAGES)
            acc = hp.warpgroup_mma_wait(0, deps=(acc,))
            mbarrier.arrive(empty.index(step_back(slot, STAGES)), count=1)
            # The planes are padded to whole tiles: no mask. What lies beyond the extents becomes zero.
            row = (tile // tiles_n).to(gl.int64) * (2 * HALF) + CONSUMER * HALF
            col = (tile % tiles_n).to(gl.int64) * BLOCK_N
            r = row + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
            c = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
            gl.store(planes + (r[:, None] * planes_row + c[None, :]), (acc * scale).to(gl.bfloat16))


@gluon.jit
def hopper_pull_kernel(
    table,
    starts,
    runs,
    order,
    scales,
    TRANSPOSED: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """TRANSPOSED: the shorter side is W's columns, P = scale * V C^T."""
    gl.static_assert(BLOCK_M == 2 * HALF)
    DOWN: gl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    ACROSS: gl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    rings = (
        ring(2 * STAGES, HALF, BLOCK_K, gl.bfloat16),
        ring(STAGES, DOWN, ACROSS, gl.bfloat16),
        barriers(STAGES, 1),
        barriers(STAGES, 2),
    )
    schedule = (table, starts, runs, order)
    gl.warp_specialize(
        [
            (_consume, (schedule, scales, rings, TRANSPOSED, gl.constexpr(0), BLOCK_N, BLOCK_K, STAGES)),
            (_consume, (schedule, scales, rings, TRANSPOSED, gl.constexpr(1), BLOCK_N, BLOCK_K, STAGES)),
            (_produce, (schedule, rings, TRANSPOSED, BLOCK_N, BLOCK_K, STAGES)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
