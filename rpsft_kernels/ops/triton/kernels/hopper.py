"""What the warp-specialised kernels for Hopper (compute capability 9.0) share.

A program is one producer warp, which only issues loads of the TMA engine, and two consumer warpgroups, which multiply.
They meet in a ring of slots in shared memory, one step of the sum each, with two barriers a slot: ``full`` (its loads
have landed) and ``empty`` (its consumers have read it). No barrier joins the whole program, so what one consumer does
besides multiplying hides behind the products of the other.

Descriptors are made on the device, where a program's next run begins: they follow the table's addresses, which may move
at every step, without work for the host, and compiled ahead of time or not makes no difference.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from . import columns as f
from .columns import FIELDS, LAYOUT

# Triton 3.8 gave them these names; 3.9 refuses those from before.
_NEW_NAMES = hasattr(tma, "async_load")
tma_load = tma.async_load if _NEW_NAMES else tma.async_copy_global_to_shared
tma_store = tma.async_store if _NEW_NAMES else tma.async_copy_shared_to_global

# Registers of a thread of the second consumer and of the producer. A program is launched with 168 for each of its three
# warpgroups; the producer's gives most of its own up, and the first consumer gets what is left.
CONSUMER_REGISTERS = gl.constexpr(232)
PRODUCER_REGISTERS = gl.constexpr(40)
# Rows of a tile that one consumer has where they share one: what an asynchronous product takes.
HALF = gl.constexpr(64)


@gluon.constexpr_function
def accumulator(cols):
    """The layout of a warpgroup's float32 sums."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, cols, 16])


@gluon.constexpr_function
def shared_layout(rows, cols, dtype):
    """The layout of a block in shared memory as both the TMA engine and the tensor cores read it."""
    return gl.NVMMASharedLayout.get_default_for([rows, cols], dtype)


@gluon.jit
def row_of(table, weight):
    """A weight's row of the table."""
    gl.static_assert(LAYOUT >= 0)
    return table + weight.to(gl.int64) * FIELDS


@gluon.jit
def address(field, TYPE: gl.constexpr):
    """The pointer in a table's field."""
    return gl.load(field).to(gl.pointer_type(TYPE))


@gluon.jit
def open_planes(fields):
    """The pointer to T or P and the stride of its rows, both of whole 16 bytes, which makes wide stores possible."""
    pointer = gl.multiple_of(address(fields + f.PLANES, gl.bfloat16), 16)
    return pointer, gl.multiple_of(gl.load(fields + f.PLANES_ROW), 8)


@gluon.jit
def describe(pointer, rows, cols, stride, ROWS: gl.constexpr, COLS: gl.constexpr, TYPE: gl.constexpr):
    """A descriptor of a matrix (rows, cols) in memory, its rows ``stride`` elements apart, read in blocks (ROWS, COLS).

    What lies beyond the matrix is read as zero and not written.
    """
    return tma.make_tensor_descriptor(
        pointer,
        [rows.to(gl.int32), cols.to(gl.int32)],
        [stride, 1],
        [ROWS, COLS],
        shared_layout(ROWS, COLS, TYPE),
    )


@gluon.jit
def ring(COUNT: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, TYPE: gl.constexpr):
    """Shared memory for blocks (ROWS, COLS)."""
    return gl.allocate_shared_memory(TYPE, [COUNT, ROWS, COLS], shared_layout(ROWS, COLS, TYPE))


@gluon.jit
def barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers that each wait for so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    # The TMA engine, which counts the bytes of its loads there, must see these ordinary stores.
    fence_async_shared()
    return found


@gluon.jit
def advance(slot, phase, STAGES: gl.constexpr):
    """The ring's next slot. ``phase``, the parity to wait for, flips with every round."""
    slot += 1
    wrap = slot == STAGES
    return gl.where(wrap, 0, slot), phase ^ wrap.to(gl.int32)


@gluon.jit
def step_back(slot, STAGES: gl.constexpr):
    """The slot before.

    A variable that is set to the slot in every round would be wrong: if both are equal before the loop, Triton's
    frontend takes it for one that the loop leaves alone.
    """
    return gl.where(slot == 0, STAGES, slot) - 1


@gluon.jit
def advance_by(slot, phase, steps, STAGES: gl.constexpr):
    """The ring's slot after so many steps."""
    ahead = slot + steps
    return ahead % STAGES, phase ^ (ahead // STAGES & 1)


@gluon.jit
def wait_for_loads(full, slot, phase, STAGES: gl.constexpr):
    """Wait until every load that was issued has landed: only then may a descriptor that loads read be replaced.

    ``slot`` is the next one to be filled in the round of ``phase``. A slot that was never filled passes at once.
    """
    for i in gl.static_range(STAGES):
        mbarrier.wait(full.index(i), gl.where(i < slot, phase, phase ^ 1))
