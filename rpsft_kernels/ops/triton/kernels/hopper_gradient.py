"""Phase 4 on Hopper: ``G = P V^T`` or ``G += P V^T`` for aligned bases in bfloat16.

The consumers take turns, a tile each: while one adds its products to G and stores them, the other multiplies. See
``hopper`` for how a program is divided, and ``gradient`` for the arithmetic, which is the same.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper as hp
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from . import columns as f
from .hopper import (
    CONSUMER_REGISTERS,
    PRODUCER_REGISTERS,
    accumulator,
    address,
    advance,
    advance_by,
    barriers,
    describe,
    ring,
    row_of,
    step_back,
    tma_load,
    tma_store,
    wait_for_loads,
)


@gluon.jit
def _sides(fields, ROWS_CONTIGUOUS: gl.constexpr):
    """Extents and row strides of the two factors, in the order in which G lies in memory: (height, width), strides."""
    planes_row, right_row = gl.load(fields + f.PLANES_ROW), gl.load(fields + f.RIGHT_ROW)
    if ROWS_CONTIGUOUS:
        return gl.load(fields + f.COLS), gl.load(fields + f.ROWS), right_row, planes_row
    else:
        return gl.load(fields + f.ROWS), gl.load(fields + f.COLS), planes_row, right_row


@gluon.jit
def _describe_gradient(
    fields,
    height,
    width,
    GRAD_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    stride = gl.load(fields + (f.GRAD_COL if ROWS_CONTIGUOUS else f.GRAD_ROW))
    return describe(address(fields + f.GRAD, GRAD_TYPE), height, width, stride, BLOCK_M, BLOCK_N, GRAD_TYPE)


@gluon.jit
def _produce(
    schedule,
    rings,
    GRAD_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    table, starts, runs, order = schedule
    lefts, rights, tiles, full, empty, read, written, _turns = rings
    pid = gl.program_id(0)
    slot, phase, count = 0, 0, 0
    for run in range(gl.load(starts + pid), gl.load(starts + pid + 1)):
        fields = row_of(table, gl.load(runs + 3 * run))
        height, width, left_stride, right_stride = _sides(fields, ROWS_CONTIGUOUS)
        rank = gl.load(fields + f.RANK)
        if ROWS_CONTIGUOUS:
            left, right = address(fields + f.RIGHT, gl.bfloat16), address(fields + f.PLANES, gl.bfloat16)
        else:
            left, right = address(fields + f.PLANES, gl.bfloat16), address(fields + f.RIGHT, gl.bfloat16)
        wait_for_loads(full, slot, phase, STAGES)
        if ACCUMULATE:
            # Of each consumer's tile, the last one that was loaded.
            mbarrier.wait(read.index(0), ((count + 1) // 2 & 1) ^ 1)
            mbarrier.wait(read.index(1), (count // 2 & 1) ^ 1)
        left_blocks = describe(left, height, rank, left_stride, BLOCK_M, BLOCK_K, gl.bfloat16)
        right_blocks = describe(right, width, rank, right_stride, BLOCK_N, BLOCK_K, gl.bfloat16)
        if ACCUMULATE:
            grad_blocks = _describe_gradient(fields, height, width, GRAD_TYPE, ROWS_CONTIGUOUS, BLOCK_M, BLOCK_N)
        tiles_n = gl.cdiv(width, BLOCK_N).to(gl.int32)
        sum_end = rank.to(gl.int32)
        last = (sum_end - 1) // BLOCK_K
        for at in range(gl.load(runs + 3 * run + 1), gl.load(runs + 3 * run + 2)):
            tile = gl.load(order + at)
            row = tile // tiles_n * BLOCK_M
            col = tile % tiles_n * BLOCK_N
            for k in range(0, sum_end, BLOCK_K):
                landed = full.index(slot)
                # The first round passes at once.
                mbarrier.wait(empty.index(slot), phase ^ 1)
                mbarrier.expect(landed, 2 * BLOCK_K * (BLOCK_M + BLOCK_N))
                tma_load(left_blocks, [row, k], landed, lefts.index(slot))
                tma_load(right_blocks, [col, k], landed, rights.index(slot))
                slot, phase = advance(slot, phase, STAGES)
                if ACCUMULATE:
                    # G's tile is wanted after the last step. Not at the first: its memory is free when the store of the
                    # tile before the other consumer's has read it, and the products should not wait for that.
                    if k == min(3, last) * BLOCK_K:
                        consumer = count & 1
                        mbarrier.wait(written.index(consumer), (count // 2 & 1) ^ 1)
                        mbarrier.expect(read.index(consumer), BLOCK_M * BLOCK_N * (GRAD_TYPE.primitive_bitwidth // 8))
                        tma_load(grad_blocks, [row, col], read.index(consumer), tiles.index(consumer))
            count += 1


@gluon.jit
def _consume(
    schedule,
    rings,
    GRAD_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    CONSUMER: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Every other tile, across the program's runs."""
    table, starts, runs, order = schedule
    lefts, rights, tiles, full, empty, read, written, turns = rings
    LAYOUT: gl.constexpr = accumulator(BLOCK_N)
    mine = tiles.index(CONSUMER)
    pid = gl.program_id(0)
    slot, phase, count = 0, 0, 0
    for run in range(gl.load(starts + pid), gl.load(starts + pid + 1)):
        fields = row_of(table, gl.load(runs + 3 * run))
        height, width, _, _ = _sides(fields, ROWS_CONTIGUOUS)
        # Stores through the descriptor before have read it: their tiles were waited for.
        grad_blocks = _describe_gradient(fields, height, width, GRAD_TYPE, ROWS_CONTIGUOUS, BLOCK_M, BLOCK_N)
        tiles_n = gl.cdiv(width, BLOCK_N).to(gl.int32)
        sum_end = gl.load(fields + f.RANK).to(gl.int32)
        steps = gl.cdiv(sum_end, BLOCK_K)
        for at in range(gl.load(runs + 3 * run + 1), gl.load(runs + 3 * run + 2)):
            if count % 2 == CONSUMER:
                turn = count // 2
                # Wait until the other consumer has begun all of its products. A parity tells only neighbouring rounds
                # of the ring apart: a slot as it was two rounds ago would pass for the one wanted.
                mbarrier.wait(turns.index(CONSUMER), (turn + 1 + CONSUMER) & 1)
                acc = gl.zeros((BLOCK_M, BLOCK_N), gl.float32, LAYOUT)
                for k in range(0, sum_end, BLOCK_K):
                    mbarrier.wait(full.index(slot), phase)
                    right = rights.index(slot).permute((1, 0))
                    # A product is begun before the one that runs is waited for, whose slot is then free.
                    acc = hp.warpgroup_mma(lefts.index(slot), right, acc, use_acc=k > 0, is_async=True)
                    acc = hp.warpgroup_mma_wait(1, deps=(acc,))
                    mbarrier.arrive(empty.index(step_back(slot, STAGES)), count=1, pred=k > 0)
                    slot, phase = advance(slot, phase, STAGES)
                mbarrier.arrive(turns.index(1 - CONSUMER), count=1)
                acc = hp.warpgroup_mma_wait(0, deps=(acc,))
                mbarrier.arrive(empty.index(step_back(slot, STAGES)), count=1)
                if ACCUMULATE:
                    mbarrier.wait(read.index(CONSUMER), turn & 1)
                if ACCUMULATE and GRAD_TYPE == gl.float32:
                    # Half of the columns at a time: the sums and a whole tile of G would not fit the registers.
                    halves = acc.reshape([BLOCK_M, 2, BLOCK_N // 2]).permute((0, 2, 1)).split()
                    for x in gl.static_range(2):
                        half = mine.slice(x * (BLOCK_N // 2), BLOCK_N // 2, dim=1)
                        half.store(halves[x] + half.load(halves[x].type.layout))
                elif ACCUMULATE:
                    mine.store((acc + mine.load(LAYOUT).to(gl.float32)).to(GRAD_TYPE))
                else:
                    mine.store(acc.to(GRAD_TYPE))
                # The TMA engine must see these ordinary stores.
                hp.fence_async_shared()
                tile = gl.load(order + at)
                tma_store(grad_blocks, [tile // tiles_n * BLOCK_M, tile % tiles_n * BLOCK_N], mine)
                # The tile's memory is free again. The other consumer multiplies meanwhile.
                tma.store_wait(0)
                if ACCUMULATE:
                    mbarrier.arrive(written.index(CONSUMER), count=1)
            else:
                # The other consumer's tile.
                slot, phase = advance_by(slot, phase, steps, STAGES)
            count += 1


@gluon.jit
def hopper_gradient_kernel(
    table,
    starts,
    runs,
    order,
    GRAD_TYPE: gl.constexpr,
    ROWS_CONTIGUOUS: gl.constexpr,
    ACCUMULATE: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program walks its runs of tiles (BLOCK_M, BLOCK_N) of G as it lies in memory.

    ROWS_CONTIGUOUS: G's memory is contiguous along the kernel's rows, so its tiles are those of G^T = V P^T.
    """
    tiles = ring(2, BLOCK_M, BLOCK_N, GRAD_TYPE)
    rings = (
        ring(STAGES, BLOCK_M, BLOCK_K, gl.bfloat16),
        ring(STAGES, BLOCK_N, BLOCK_K, gl.bfloat16),
        tiles,
        barriers(STAGES, 1),
        barriers(STAGES, 1),
        barriers(2, 1),
        barriers(2, 1),
        barriers(2, 1),
    )
    schedule = (table, starts, runs, order)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    schedule,
                    rings,
                    GRAD_TYPE,
                    ROWS_CONTIGUOUS,
                    ACCUMULATE,
                    gl.constexpr(0),
                    BLOCK_M,
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
                    GRAD_TYPE,
                    ROWS_CONTIGUOUS,
                    ACCUMULATE,
                    gl.constexpr(1),
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    STAGES,
                ),
            ),
            (
                _produce,
                (
                    schedule,
                    rings,
                    GRAD_TYPE,
                    ROWS_CONTIGUOUS,
                    ACCUMULATE,
                    BLOCK_M,
                    BLOCK_N,
                    BLOCK_K,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
