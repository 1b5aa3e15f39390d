"""What the emulator must report: bad accesses, reads of what was never written, races, deadlocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ptxrun import Deadlock, GlobalMemory, MemoryFault, PtxError, RaceError, UninitialisedRead, region_of
from ptxrun.handwritten import kernel

# %d1: the address of this thread's word of the first argument.
WORD = "mov.u32 %r1, %tid.x; ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %r1, 4, %d1; "
# %r2: the address of this thread's word in shared memory.
SHARED = "mov.u32 %r1, %tid.x; mov.u32 %r3, smem; shl.b32 %r2, %r1, 2; add.s32 %r2, %r2, %r3; "


# -- global memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["ld.global.b32 %r2, [%d1];", "st.global.b32 [%d1], %r1;"])
def test_out_of_bounds(access: str) -> None:
    kernel(WORD + access + " ret;", [np.zeros(32, np.int32)], threads=32)
    with pytest.raises(MemoryFault, match=r"out-of-bounds 4-byte global.*runs|past the end") as error:
        kernel(WORD + access + " ret;", [np.zeros(31, np.int32)], threads=32)
    assert "thread 31" in str(error.value)


def test_the_bytes_next_to_a_view_belong_to_nobody() -> None:
    with pytest.raises(MemoryFault, match="out-of-bounds"):
        kernel(WORD + "ld.global.b32 %r2, [%d1]; ret;", [torch.zeros(64)[:31]], threads=32)
    with pytest.raises(MemoryFault, match="gap between the rows"):
        kernel(WORD + "ld.global.b32 %r2, [%d1]; ret;", [torch.zeros(4, 10)[:, :9]], threads=32)


def test_alignment() -> None:
    array = np.zeros(40, np.int32)
    start = -array.ctypes.data // 4 % 4
    body = "ld.param.u64 %d1, [p0]; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1]; ret;"
    kernel(body, [array[start:]], threads=32)
    with pytest.raises(MemoryFault, match="misaligned 16-byte global access"):
        kernel(body, [array[start + 1 :]], threads=32)


def test_read_only_arrays() -> None:
    array = np.zeros(32, np.int32)
    array.flags.writeable = False
    with pytest.raises(MemoryFault, match="read-only"):
        kernel(WORD + "st.global.b32 [%d1], %r1; ret;", [array], threads=32)


def test_global_memory_that_was_never_written() -> None:
    """Known from launch to launch, byte for byte; plain loads and asynchronous copies."""
    array = np.zeros(32, np.int32)
    memory = GlobalMemory()
    memory.add(region_of(array, "workspace", unwritten=True))
    copy = SHARED + WORD + "cp.async.ca.shared.global [%r2], [%d1], 4; cp.async.wait_all; ret;"
    for body in (WORD + "ld.global.b32 %r2, [%d1]; ret;", copy):
        with pytest.raises(UninitialisedRead, match="load of byte 0 of workspace"):
            kernel(body, [array], threads=32, shared=128, memory=memory)
    # All but the last word, then its first half, then all of it.
    kernel(WORD + "setp.lt.u32 %p1, %r1, 31; @%p1 st.global.b32 [%d1], %r1; ret;", [array], threads=32, memory=memory)
    with pytest.raises(UninitialisedRead, match="load of byte 124 of workspace"):
        kernel(copy, [array], threads=32, shared=128, memory=memory)
    kernel("mov.b16 %h1, 1; " + WORD + "st.global.b16 [%d1], %h1; ret;", [array], threads=32, memory=memory)
    with pytest.raises(UninitialisedRead, match="load of byte 124 of workspace"):
        kernel(copy, [array], threads=32, shared=128, memory=memory)
    kernel("mov.b16 %h1, 1; " + WORD + "st.global.b16 [%d1+2], %h1; ret;", [array], threads=32, memory=memory)
    kernel(copy, [array], threads=32, shared=128, memory=memory)


def test_races_of_programs() -> None:
    memory = GlobalMemory(check_races=True)
    array = np.zeros(64, np.int32)
    memory.add(region_of(array, "array"))
    own = "mov.u32 %r5, %ctaid.x; shl.b32 %r6, %r5, 5; mov.u32 %r1, %tid.x; add.s32 %r1, %r1, %r6; "
    own += "ld.param.u64 %d1, [p0]; mad.wide.u32 %d1, %r1, 4, %d1; st.global.b32 [%d1], %r1; "
    kernel(own + "ret;", [array], threads=32, programs=2, memory=memory)
    # The same again is no race with the launch before.
    kernel(own + "ret;", [array], threads=32, programs=2, memory=memory)
    read = "ld.param.u64 %d1, [p0]; ld.global.b32 %r2, [%d1]; ret;"
    with pytest.raises(RaceError, match="CTA number 0 wrote"):
        kernel(own + read, [array], threads=32, programs=2, memory=memory)


def test_threads_that_store_different_values_to_one_address() -> None:
    array = np.zeros(1, np.int32)
    store = "mov.u32 %r1, {value}; ld.param.u64 %d1, [p0]; st.global.b32 [%d1], %r1; ret;"
    kernel(store.replace("{value}", "5"), [array], threads=32)
    with pytest.raises(RaceError, match="different values"):
        kernel(store.replace("{value}", "%tid.x"), [array], threads=32)
    body = SHARED + "and.b32 %r2, %r2, -64; st.shared.b32 [%r2], {value}; ret;"
    kernel(body.replace("{value}", "5"), [], threads=32, shared=256)
    with pytest.raises(RaceError, match="different values"):
        kernel(body.replace("{value}", "%r1"), [], threads=32, shared=256)


# -- shared memory --------------------------------------------------------------------------------------------


def test_shared_memory_that_was_never_written() -> None:
    with pytest.raises(UninitialisedRead, match="never-written"):
        kernel(SHARED + "ld.shared.b32 %r4, [%r2]; ret;", [], threads=32, shared=128)


@pytest.mark.parametrize(("offset", "message"), [(128, "out-of-bounds"), (-4, "out-of-bounds"), (2, "misaligned")])
def test_shared_bounds_and_alignment(offset: int, message: str) -> None:
    with pytest.raises(MemoryFault, match=message):
        kernel(f"mov.u32 %r3, smem; st.shared.b32 [%r3+{offset}], 0; ret;", [], threads=32, shared=128)


@pytest.mark.parametrize("groups", [2, 1, 0])
def test_asynchronous_copies(groups: int) -> None:
    """Two groups, the first one is read: wait_group 1 is enough, 2 is not."""
    body = SHARED + WORD + "cp.async.ca.shared.global [%r2], [%d1], 4; cp.async.commit_group; "
    body += "cp.async.ca.shared.global [%r2+128], [%d1], 4; cp.async.commit_group; "
    body += f"cp.async.wait_group {groups}; ld.shared.b32 %r5, [%r2]; cp.async.wait_all; ret;"
    if groups == 2:
        with pytest.raises(UninitialisedRead, match="in flight"):
            kernel(body, [np.zeros(32, np.int32)], threads=32, shared=256)
    else:
        kernel(body, [np.zeros(32, np.int32)], threads=32, shared=256)


@pytest.mark.parametrize("barriers", [(True, True), (False, True), (True, False)])
def test_races_of_warps(barriers: tuple[bool, bool]) -> None:
    """Every warp writes its words, reads its neighbour's and writes again."""
    one, two = ("bar.sync 0;" if barrier else "" for barrier in barriers)
    body = SHARED + f"st.shared.b32 [%r2], %r1; {one} xor.b32 %r4, %r2, 128; ld.shared.b32 %r5, [%r4]; {two} "
    body += "st.shared.b32 [%r2], %r5; ret;"
    if all(barriers):
        kernel(body, [], threads=64, shared=256)
    else:
        with pytest.raises(RaceError, match="no synchronisation between"):
            kernel(body, [], threads=64, shared=256)


# -- registers and control flow -------------------------------------------------------------------------------


def test_registers_that_were_never_written() -> None:
    start = "mov.u32 %r1, %tid.x; setp.lt.u32 %p1, %r1, 5; @%p1 mov.b32 %r2, 7; "
    with pytest.raises(UninitialisedRead, match="%r2 read before it was written"):
        kernel(start + "add.s32 %r3, %r2, 1; ret;", [], threads=32)
    kernel(start + "@!%p1 mov.b32 %r2, 8; add.s32 %r3, %r2, 1; ret;", [], threads=32)


def test_divergent_loops_and_early_exit() -> None:
    out = np.full(128, -1, np.int32)
    body = """setp.eq.u32 %p1, %r1, 77; @%p1 ret;
    mov.b32 %r2, 0; mov.b32 %r3, 0; and.b32 %r5, %r1, 7;
outer:
    mov.b32 %r4, 0;
inner:
    add.s32 %r2, %r2, %r4; add.s32 %r4, %r4, 1;
    setp.gt.u32 %p4, %r2, 100; @%p4 bra done;
    setp.lt.u32 %p2, %r4, %r5; @%p2 bra inner;
    add.s32 %r3, %r3, 1; setp.lt.u32 %p3, %r3, %r1; @%p3 bra outer;
    and.b32 %r6, %r1, 1; setp.eq.u32 %p5, %r6, 0; @%p5 bra even;
    add.s32 %r2, %r2, 1000; bra.uni done;
even:
    add.s32 %r2, %r2, 2000;
done:
    st.global.b32 [%d1], %r2; ret;"""
    kernel(WORD + body, [out])

    def expected(t: int) -> int:
        if t == 77:
            return -1
        total = i = 0
        while True:
            j = 0
            while True:
                total += j
                j += 1
                if total > 100:
                    return total
                if j >= (t & 7):
                    break
            i += 1
            if i >= t:
                return total + (2000 if t % 2 == 0 else 1000)

    assert out.tolist() == [expected(t) for t in range(128)]


@pytest.mark.parametrize(
    ("error", "match", "body"),
    [
        (PtxError, "part of warp", "setp.lt.u32 %p1, %r1, 5; @%p1 bra a; bar.sync 0; a: bar.sync 0; ret;"),
        (Deadlock, "bar.sync", "setp.lt.u32 %p1, %r1, 32; @%p1 bra a; bar.sync 1, 64; a: bar.sync 2, 64; ret;"),
        (
            PtxError,
            "inactive lane|do not take part",
            "setp.lt.u32 %p1, %r1, 5; @%p1 bra a; shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1; a: ret;",
        ),
        (Deadlock, "basic blocks", "a: bra.uni a;"),
        (NotImplementedError, "not supported: popc", "popc.b32 %r2, %r1; ret;"),
    ],
)
def test_control_flow_errors(error: type[Exception], match: str, body: str) -> None:
    options: dict[str, Any] = {"max_steps": 1000}
    with pytest.raises(error, match=match):
        kernel("mov.u32 %r1, %tid.x; " + body, [], threads=64, **options)


def test_a_loop_is_counted() -> None:
    body = "mov.b32 %r1, 0; a: add.s32 %r1, %r1, 1; setp.lt.u32 %p1, %r1, 10; @%p1 bra a; ret;"
    stats = kernel(body, [], threads=64, programs=3)
    assert dict(stats.instructions) == {"mov.b32": 6, "add.s32": 60, "setp.lt.u32": 60, "bra": 60, "ret": 6}
    assert stats.ctas == 3 and stats.count("setp") == 60
