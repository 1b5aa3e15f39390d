"""Warps that go their own ways: what orders them, and what is reported when they wait for ever."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptxrun import Deadlock, PtxError, RaceError
from ptxrun.handwritten import kernel

# %r1: the thread; %r3: shared memory, in which mbarriers lie from 1024 on; %p1..%p3: it is in warp 1..3.
START = """mov.u32 %r1, %tid.x; mov.u32 %r3, smem; shr.u32 %r4, %r1, 5; setp.eq.u32 %p10, %r1, 0;
 setp.eq.u32 %p1, %r4, 1; setp.eq.u32 %p2, %r4, 2; setp.eq.u32 %p3, %r4, 3; and.b32 %r5, %r1, 31;
 setp.eq.u32 %p11, %r5, 0; shl.b32 %r2, %r1, 2; add.s32 %r2, %r2, %r3;
"""
WRITE = " st.shared.b32 [%r3], 7;\n"
READ = " ld.shared.b32 %r9, [%r3];\n"


def parts(
    *bodies: str, counts: tuple[int, ...] = (), orders: tuple[str, ...] = ("forward", "reverse"), **options: Any
) -> None:
    """Warps 0 to 3 go on with a body each, after mbarriers for so many arrivals have been initialised."""
    init = "".join(f" @%p10 mbarrier.init.shared.b64 [%r3+{1024 + 8 * i}], {n};\n" for i, n in enumerate(counts))
    text = START + init + " @%p10 st.shared.b32 [%r3], 6; bar.sync 0;\n"
    text += "".join(f" @%p{i} bra part{i};\n" for i in range(1, len(bodies)))
    text += "".join(f"part{i}:\n {body}\n bra.uni end;\n" for i, body in enumerate(bodies)) + "end: bar.sync 0; ret;"
    for order in orders:
        kernel(text, shared=2048, target="sm_90a", threads=128, order=order, **options)


def arrive(barrier: int = 0) -> str:
    """One thread of the warp arrives."""
    return f" @%p11 mbarrier.arrive.shared.b64 _, [%r3+{1024 + 8 * barrier}];\n"


def wait(parity: int = 0, barrier: int = 0) -> str:
    wait.count += 1  # type: ignore[attr-defined]
    name = f"w{wait.count}"  # type: ignore[attr-defined]
    return f"{name}: mbarrier.try_wait.parity.shared.b64 %p9, [%r3+{1024 + 8 * barrier}], {parity}; @!%p9 bra {name};\n"


wait.count = 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("sync", ["bar.sync 1, 64;", "barrier.sync 1, 64;", "barrier.cta.sync 1, 64;"])
def test_a_named_barrier_orders_those_that_meet(sync: str) -> None:
    parts(WRITE + sync, sync + READ, "", "")
    parts(WRITE + sync, sync + "bar.sync 2, 64;", "bar.sync 2, 64;" + READ, "")  # knowledge is passed on
    for wrong in (
        (WRITE + sync, READ + sync, "", ""),
        (sync + WRITE, sync + READ, "", ""),
        (WRITE + sync, sync, READ, ""),  # warp 2 did not meet them
        (WRITE + sync, sync + "bar.sync 2, 64;", READ + "bar.sync 2, 64;", ""),
    ):
        with pytest.raises(RaceError, match=r"offset 0 by warp \d, (read|written) by warp \d"):
            parts(*wrong)


def test_an_arrival_orders_in_one_direction() -> None:
    parts(WRITE + "bar.arrive 1, 64;", "bar.sync 1, 64;" + READ, "", "")
    for wrong in (
        ("bar.arrive 1, 64;" + WRITE, "bar.sync 1, 64;" + READ, "", ""),
        ("bar.arrive 1, 64;" + READ, WRITE + "bar.sync 1, 64;", "", ""),
    ):
        with pytest.raises(RaceError, match="no synchronisation between"):
            parts(*wrong)


def test_an_mbarrier_orders_arrivals_before_waits() -> None:
    parts(WRITE + arrive(), wait() + READ, "", "", counts=(1,))
    there, back = WRITE + arrive() + wait(0, 1) + WRITE, READ + arrive(1)
    parts(there, wait() + back, wait() + back, "", counts=(1, 2))
    for wrong, counts in (
        ((arrive() + WRITE, wait() + READ, "", ""), (1,)),
        ((WRITE + arrive(), wait(), READ, ""), (1,)),
        ((WRITE, wait() + READ, arrive(), ""), (1,)),
        ((there, wait() + back, wait() + READ, ""), (1, 1)),
    ):
        with pytest.raises(RaceError, match=r"offset 0 by warp \d, (read|written) by warp \d"):
            parts(*wrong, counts=counts)
    # The other parity passes at once, or never.
    wrong = (WRITE + arrive(), wait(1) + READ, "", "")
    for order, error in (("forward", Deadlock), ("reverse", RaceError)):
        with pytest.raises(error):
            parts(*wrong, counts=(1,), orders=(order,))


def test_an_arrival_speaks_for_its_warp_alone() -> None:
    """Warps 1 and 2 read, warp 1 arrives for both: enough where they met before."""
    meet = "bar.sync 1, 64;"
    parts(wait() + WRITE, READ + meet + arrive(), READ + meet, "", counts=(1,))
    for wrong in ((READ + arrive() + meet, READ + meet), (meet + READ + arrive(), meet + READ)):
        with pytest.raises(RaceError, match="read by warp 2"):
            parts(wait() + WRITE, *wrong, "", counts=(1,))


def test_a_phase_that_nothing_waited_for() -> None:
    """Whoever waits for a parity afterwards cannot tell what it finds from what was there two phases before."""
    parts(arrive() + wait(0, 1) + arrive(), wait() + arrive(1) + wait(1), "", "", counts=(1, 1))
    with pytest.raises(PtxError, match="completes phase 1 .* nothing waited for the one before"):
        parts(arrive() + arrive(), "bar.sync 1, 64;" + wait(), "bar.sync 1, 64;", "", counts=(1,), races=False)


def test_too_many_arrivals() -> None:
    with pytest.raises(PtxError, match="more arrivals than the 1 expected"):
        parts(" mbarrier.arrive.shared.b64 _, [%r3+1024], 2;", wait(), "", "", counts=(1,))


def test_a_deadlock_says_who_waits_where() -> None:
    with pytest.raises(Deadlock) as error:
        parts("bar.sync 1, 96;", "bar.sync 1, 96;", wait(0, 1), "", counts=(1, 2))
    lines = [" ".join(line.split()) for line in str(error.value).splitlines()]
    assert lines[0].startswith("deadlock in CTA (0, 0, 0)")
    told = {line.split(" wait at ")[0]: (line, why) for line, why in zip(lines[1::2], lines[2::2], strict=True)}
    phase = "parity 0 of phase 0 (counted from 0), which lacks 2 arrivals of 2 and 0 bytes"
    for warp, where, why in (
        (0, "bar.sync 1, 96", "barrier 1: 64 threads of 96 arrived, warps [0, 1]"),
        (1, "bar.sync 1, 96", "barrier 1: 64 threads of 96 arrived, warps [0, 1]"),
        (2, "mbarrier.try_wait", f"mbarrier at shared offset 1032: {phase}"),
        (3, "bar.sync 0", "barrier 0: 32 threads of 128 arrived, warps [3]"),
    ):
        assert where in told[f"warps [{warp}]"][0] and told[f"warps [{warp}]"][1] == why


def test_registers_are_redistributed() -> None:
    """A warp that asks for more registers waits until others have given theirs back."""
    few, more = "setmaxnreg.dec.sync.aligned.u32 40;", "setmaxnreg.inc.sync.aligned.u32 {n};"
    parts(more.format(n=88), few, few, few)  # without .maxnreg nothing is known
    parts(more.format(n=136), "bar.sync 1, 64;" + few, "bar.sync 1, 64;" + few, few, registers=64)
    with pytest.raises(Deadlock) as error:
        parts(more.format(n=144), few, few, few, registers=64)
    assert "setmaxnreg.inc" in str(error.value) and "by warp: [64, 40, 40, 40]" in str(error.value)


def test_the_order_of_the_warps() -> None:
    """Both warps store to one word; which one comes last depends on the order."""
    found = []
    for order in ("forward", "reverse"):
        out = np.zeros(1, np.int32)
        body = START + "ld.param.u64 %d1, [p0]; @%p1 bra other; bar.sync 1, 32; st.global.b32 [%d1], 1; bra.uni end;"
        body += "other: bar.sync 2, 32; st.global.b32 [%d1], 2; end: bar.sync 0; ret;"
        kernel(body, [out], threads=64, target="sm_90a", order=order)
        found.append(int(out[0]))
    assert sorted(found) == [1, 2]
