"""Registers and shared memory of a wgmma in flight must be left alone until the wait_group that covers it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from ptxrun import GlobalMemory, Program, RaceError, RegisterHazard, parse, region_of
from ptxrun.handwritten import HEAD, kernel
from ptxrun.tensormap import tensor_map

COMMIT = " wgmma.commit_group.sync.aligned;\n"
# A 16 x 8 tile of ones for B at the start of shared memory; A all ones in %r10.. (and %r14..), accumulators 0 in %r20..
# (and %r24..).
START = (
    """mov.u32 %r1, %tid.x; ld.param.u64 %d9, [p0]; mad.wide.u32 %d9, %r1, 4, %d9; mov.u32 %r3, smem;
    and.b32 %r2, %r1, 63; shl.b32 %r2, %r2, 2; add.s32 %r2, %r2, %r3; setp.lt.u32 %p1, %r1, 64;
    @%p1 st.shared.b32 [%r2], 0x3F803F80;
    setp.ge.u32 %p3, %r1, 128; mov.pred %p2, 1; fence.proxy.async.shared::cta; bar.sync 0;
    shr.b32 %r4, %r3, 4; cvt.u64.u32 %d1, %r4; or.b64 %d1, %d1, 0x80000; mov.b32 %r30, 0;
    """
    + " ".join(f"mov.b32 %r{i}, {0x3F803F80 if i < 18 else 0};" for i in (*range(10, 18), *range(20, 28)))
    + "\n wgmma.fence.sync.aligned;\n"
)
END = "\n wgmma.wait_group.sync.aligned 0; st.global.b32 [%d9], %r20; ret;"


def registers(first: int, n: int = 4) -> str:
    return "{" + ", ".join(f"%r{i}" for i in range(first, first + n)) + "}"


def mma(acc: int = 20, a: int = 10, n: int = 8) -> str:
    operands = f"{registers(acc, n // 2)}, {registers(a)}, %d1, %p2, 1, 1, 0"
    return f" wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {operands};\n"


def wait(n: int) -> str:
    return f" wgmma.wait_group.sync.aligned {n};\n"


def first(body: str, threads: int = 128, **options: Any) -> npt.NDArray[np.float32]:
    """First accumulator of every thread."""
    out = np.full(threads, -1, np.float32)
    kernel(START + body + END, [out], threads=threads, shared=256, target="sm_90a", **options)
    return out


def proven(body: str) -> bool:
    """Whether the analysis of all paths finds nothing that could touch a wgmma in flight."""
    text = HEAD.format(target="sm_90a", params=".param .u64 p0", threads=128, directives="", body=START + body + END)
    return not Program(parse(text).entries["k"]).wgmma_hazards


@pytest.mark.parametrize(
    ("touch", "what"),
    [
        ("mov.b32 %r12, 0;", "%r12 written while it is part of the A operand"),
        ("@%p2 mov.b32 %r12, 0;", "%r12 written while it is part of the A operand"),
        ("mov.b64 {%r5, %r13}, %d1;", "%r13 written while it is part of the A operand"),
        ("add.s32 %r5, %r6, %r21;", "%r21 read while it is an accumulator"),
        ("st.shared.b32 [%r2], %r23;", "%r23 read while it is an accumulator"),
        ("mov.b64 %d2, {%r5, %r22};", "%r22 read while it is an accumulator"),
        ("mov.b32 %r20, 0;", "%r20 written while it is an accumulator"),
        ("shfl.sync.bfly.b32 %r21|%p5, %r5, 1, 31, -1;", "%r21 written while it is an accumulator"),
        (mma(24, 20) + COMMIT, "%r20 read as A operand while it is an accumulator"),
        (mma(10, 14) + COMMIT, "%r10 used as accumulator while it is part of the A operand"),
        (mma(22, 14) + COMMIT, "%r22 used in another accumulator or shape"),
        (mma(20, 14, n=16) + COMMIT, "%r20 used in another accumulator or shape"),
    ],
)
@pytest.mark.parametrize("committed", [True, False])
def test_a_register_in_flight(touch: str, what: str, committed: bool) -> None:
    init = "mov.b32 %r5, 0; mov.b32 %r6, 0; "
    # committed: two groups, the second one touches nothing of interest
    flight = mma() + COMMIT + "mov.b32 %r5, %r5;" + wait(1) if committed else mma() + wait(0)
    body = init + flight + touch + ("" if committed else COMMIT)
    with pytest.raises(RegisterHazard) as error:
        first(body, races=False)
    text = " ".join(str(error.value).split())
    assert what in text and "PTX line" in text and "thread 0 " in text and "m64n8k16" in text
    assert ("wait_group 0 or less would cover it" if committed else "not committed yet") in text
    assert not proven(body)
    right = init + mma() + COMMIT + wait(0) + touch
    first(right, races=False)
    assert proven(right)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (mma() + COMMIT, 16),
        # A may be read, the accumulator used again.
        (mma() + "add.s32 %r5, %r10, %r11;" + mma() + COMMIT, 32),
        (mma() + COMMIT + mma(a=14) + COMMIT + wait(0) + "mov.b32 %r10, 0; mov.b32 %r14, 0;", 32),
        (mma() + COMMIT + mma(24, 14) + COMMIT + wait(1) + "mov.b32 %r10, 0; mov.b32 %r5, %r20;", 16),
    ],
)
def test_right_programs_pass(body: str, value: int) -> None:
    assert (first(body) == value).all()
    assert proven(body)


def test_what_is_not_executed_is_no_hazard_of_a_run() -> None:
    body = "mov.pred %p4, 0;" + mma() + COMMIT + "@%p4 mov.b32 %r10, 0; @!%p2 mov.b32 %r20, 0;"
    assert (first(body) == 16).all()
    assert not proven(body)


@pytest.mark.parametrize("n", range(4))
@pytest.mark.parametrize("which", range(3))
def test_a_wait_with_several_groups(n: int, which: int) -> None:
    """Three groups, whose A is in %r10 (the oldest), %r14 and %r32: wait_group n leaves the n newest in flight."""
    a = (10, 14, 32)
    body = " ".join(f"mov.b32 %r{i}, 0x3F803F80;" for i in range(32, 36))
    body += mma(a=10) + COMMIT + mma(a=14) + COMMIT + wait(2) + mma(a=32) + COMMIT
    body += wait(n) + f"mov.b32 %r{a[which]}, 0;"
    if which >= 3 - n:
        with pytest.raises(RegisterHazard, match=f"%r{a[which]} written") as error:
            first(body)
        assert f"wait_group {2 - which} or less" in str(error.value)
        assert not proven(body)
    else:
        assert (first(body) == 48).all()
        assert proven(body)


def loop(before: str, behind: str) -> str:
    tile = " ".join(f"mov.b32 %r{i}, 0x3F803F80;" for i in range(10, 14))
    return (
        f"mov.b32 %r40, 0;\nloop:\n{before} {tile} wgmma.fence.sync.aligned;\n" + mma() + COMMIT + behind
        + "add.s32 %r40, %r40, 1; setp.lt.u32 %p4, %r40, 4; @%p4 bra loop;\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "behind", "right"),
    [("", wait(1), False), ("", "", False), ("", wait(0), True), (wait(0), wait(1), True), (wait(1), "", False)],
)
def test_the_next_iteration_overwrites_the_operand(before: str, behind: str, right: bool) -> None:
    """The pattern of Triton 3.6 and 3.7: the operand is computed before the wait for the product that reads it."""
    body = loop(before, behind)
    assert proven(body) == right
    if right:
        assert (first(body) == 64).all()
    else:
        with pytest.raises(RegisterHazard, match="%r10 written while it is part of the A operand"):
            first(body)


def test_the_youngest_counts_where_paths_meet() -> None:
    """One path commits another group behind the product, the other does not: wait_group 1 covers it on one only."""
    fork = (
        "setp.lt.u32 %p4, %r1, {n};\n"
        + mma()
        + COMMIT
        + "@%p4 bra join;\n"
        + mma(24, 14)
        + COMMIT
        + "join:\n"
        + wait(1)
    )
    body = fork.replace("{n}", "0") + "mov.b32 %r10, 0;"
    assert (first(body) == 16).all()
    assert not proven(body)
    with pytest.raises(RegisterHazard, match="%r10 written"):
        first(fork.replace("{n}", "128") + "mov.b32 %r10, 0;")


def test_switched_off_the_result_is_wrong() -> None:
    assert (first(mma() + COMMIT + "mov.b32 %r10, 0;", wgmma_registers=False) != 16).any()


def test_only_the_registers_of_the_warpgroup_itself() -> None:
    """Warpgroup 1 has a wgmma in flight, warpgroup 0 uses registers of the same names."""
    flight = "@!%p3 bra join;\n" + mma() + COMMIT + "{own}\njoin:\n"
    other = flight.replace("{own}", "")
    out = first(other + "@!%p3 mov.b32 %r10, 0; @!%p3 mov.b32 %r20, 7;", threads=256)
    assert (out[128:] == 16).all() and (out[:128].view(np.int32) == 7).all()
    for body in (
        flight.replace("{own}", "mov.b32 %r10, 0;"),
        other + "@%p3 mov.b32 %r10, 0;",
        other + "mov.b32 %r10, 0;",
    ):
        with pytest.raises(RegisterHazard, match="thread 128 "):
            first(body, threads=256)


# -- shared memory that a wgmma in flight reads ---------------------------------------------------------------


def overwrite(before: str, after: str = "", threads: int = 256) -> npt.NDArray[np.float32]:
    """Both warpgroups read the tile with wgmma; ``before``; then thread 0 has a bulk copy overwrite it; ``after``."""
    ones = np.full(256, 0x3F80, np.uint16)
    raw = np.zeros(192, np.uint8)
    descriptor = raw[-raw.ctypes.data % 64 :][:128]
    descriptor[:] = np.frombuffer(tensor_map(ones.ctypes.data, 10, [256], [1], [128], 0), np.uint8)
    memory = GlobalMemory()
    memory.add(region_of(ones, "ones"))
    out = np.zeros(threads, np.float32)
    copy = "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%r3], [%d5, {%r9}], [%r8];"
    body = (
        START
        + """ld.param.u64 %d5, [p1]; add.s32 %r8, %r3, 256; mov.b32 %r9, 0; setp.eq.u32 %p6, %r1, 0;
    @%p6 mbarrier.init.shared.b64 [%r8], 1; fence.proxy.async.shared::cta; bar.sync 0;
    """
        + mma() + COMMIT + before
        + f"@%p6 mbarrier.arrive.expect_tx.shared.b64 _, [%r8], 256; @%p6 {copy}\n"
        + after + wait(0)
        + "waits: mbarrier.try_wait.parity.shared.b64 %p7, [%r8], 0; @!%p7 bra waits;"
        + END
    )  # fmt: skip
    kernel(body, [out, descriptor], threads=threads, shared=512, target="sm_90a", memory=memory)
    return out


def test_a_bulk_copy_over_what_another_warpgroup_reads() -> None:
    assert (overwrite(wait(0) + "bar.sync 0;") == 16).all()
    with pytest.raises(RaceError, match="bulk load to offset 0 by warp 0, read by warp"):
        overwrite(wait(0))  # warpgroup 1 waits, but thread 0 does not know
    other = "@%p3 bra skip;\n" + wait(0) + "skip: bar.sync 0;"
    with pytest.raises(RaceError, match="bulk load to offset 0 by warp 0, read by warp 4"):
        overwrite(other)  # warpgroup 1 does not wait
    with pytest.raises(RaceError, match="bulk load to offset 0 by warp 0, read by warp 4"):
        overwrite("ld.shared.b32 %r50, [%r2];" + other)  # an ordinary read of the same bytes hides nothing


@pytest.mark.parametrize(("threads", "store"), [(128, "st.shared"), (256, "@!%p3 st.shared")])
def test_a_store_over_what_a_wgmma_reads(threads: int, store: str) -> None:
    store += ".b32 [%r2], 0;"
    with pytest.raises(RaceError, match="write to offset"):
        first(mma() + COMMIT + "bar.sync 0;" + store, threads=threads)
    assert (first(mma() + COMMIT + wait(0) + "bar.sync 0;" + store, threads=threads) == 16).all()
