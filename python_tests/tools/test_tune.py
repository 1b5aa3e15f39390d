"""The search for tile shapes, with a timer, a clock and a compiler that are made up. It needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jitted
from planned import planned_for
from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton import toolchain
from rpsft_kernels.ops.triton.aot.targets import BY_TABLE
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.launch import watch_launches
from rpsft_kernels.ops.triton.tile_table import PHASES, forget_tuned, rank_class, rank_classes, tile_table
from rpsft_kernels.ops.triton.variants import SPECIALISED, Variant
from rpsft_kernels.ops.triton.waiting import Stalled
from rpsft_kernels.tools.cli import main
from rpsft_kernels.tools.models import MODELS
from rpsft_kernels.tools.tune import tune
from rpsft_kernels.tools.tuning import timer as timers
from rpsft_kernels.tools.tuning.candidates import Row, list_candidates
from rpsft_kernels.tools.tuning.compiling import Compiled, compile_variants
from rpsft_kernels.tools.tuning.timer import EventTimer

CPU = torch.device("cpu")
TUNED = ("project", "drift", "pull", "gradient")
# Both orientations; sums of C that are split.
SHAPES = [(512, 640), (640, 512)]
RANK = 192


class Watch:
    """A timer that launches what it times and asks ``milliseconds`` for the time, and a clock that it moves."""

    def __init__(self, milliseconds: Callable[[list[Variant]], float], seconds: float = 0.0) -> None:
        self.now = 0.0
        self.timed: list[list[Variant]] = []
        self._milliseconds, self._seconds = milliseconds, seconds

    def clock(self) -> float:
        return self.now

    def timer(self, run: Callable[[], None]) -> float:
        self.timed.append([])
        with watch_launches(self):
            run()
        self.now += self._seconds
        return self._milliseconds(self.timed[-1])

    def on_launch(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        self.timed[-1].append(variant)

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        raise AssertionError(f"{variant.label()}: {error}")


def compile_nothing(variants: Sequence[Variant], *_: Any) -> Compiled:
    return dict.fromkeys(variants)


def row_of(table: dict[str, Any], phase: str, rank: int = RANK) -> Row:
    rows: list[Row] = table[phase]["one part"]
    return next(row for row in rows if rank_class(rank) <= row["rank"])


def plain(m: int, n: int = 32, k: int = 32) -> Row:
    return {"block_m": m, "block_n": n, "block_k": k, "warps": 4, "stages": 1, "blocks_per_sm": 1}


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    forget_tuned()
    yield
    forget_tuned()


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Launches on the CPU are planned for an H200, and never made."""
    profile = Profile("sm_90", 132, True)
    monkeypatch.setattr(triton_device, "own_profile", lambda _: profile)
    with planned_for(profile, lambda *_: None):
        yield


def test_the_fastest_rows_are_taken_and_what_fails_is_passed_over(
    capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    """With launches that are really made."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9 and toolchain.touches_products():
        pytest.skip(f"Triton {toolchain.triton_version()} may compile code for compute capability 9.0 that is refused")
    architecture = triton_device.own_profile(device).architecture
    shipped = tile_table(architecture)

    def milliseconds(variants: list[Variant]) -> float:
        height = variants[0].blocks[0]
        if height == 128:
            raise RuntimeError("out of shared memory")
        return 1.0 if height == 64 else 2.0

    watch = Watch(milliseconds)
    candidates = [plain(64), plain(128)]
    table = tune([(40, 48)], 16, device, candidates, timer=watch.timer, compile_all=compile_nothing)
    printed = capsys.readouterr().out
    for phase in TUNED:
        assert row_of(table, phase, 16) == {"rank": row_of(shipped, phase, 16)["rank"], **plain(64)}
        assert f"{phase}: passed over 128x32x32, 4 warps, 1 stages: RuntimeError: out of shared memory" in printed
    assert {variants[0].blocks[0] for variants in watch.timed} >= {64, 128}
    # The shipped table is not written to.
    assert tile_table(architecture) == shipped and "RPSFT_TILES" not in os.environ


@pytest.mark.usefixtures("h200")
def test_phases_are_timed_by_themselves() -> None:
    watch = Watch(lambda _: 1.0)
    table = tune(SHAPES, RANK, CPU, [], timer=watch.timer, compile_all=compile_nothing)
    # Two orientations have launches of their own. The sums of squares belong to no phase.
    seen = [[variant.kernel for variant in variants] for variants in dict.fromkeys(map(tuple, watch.timed))]
    split = [["hopper_project"], ["drift", "reduce"], ["round", "hopper_pull"], ["hopper_gradient"]]
    assert seen == [2 * kernels for kernels in split]
    # Equal times leave everything as it is shipped.
    assert table == tile_table("sm_90")


@pytest.mark.usefixtures("h200")
def test_specialised_and_plain_candidates_compete() -> None:
    wanted: list[Variant] = []

    def compile_all(variants: Sequence[Variant], architecture: str, device: torch.device, seconds: float) -> Compiled:
        assert architecture == "sm_90" and seconds > 0
        wanted.extend(variants)
        return compile_nothing(variants)

    def milliseconds(variants: list[Variant]) -> float:
        # Plain ones are the fastest for project, narrower specialised ones for the gradient.
        last = variants[-1]
        return {"project": 1.0, "hopper_gradient": last.blocks[1] / 64}.get(last.kernel, 9.0)

    watch = Watch(milliseconds)
    table = tune(SHAPES, RANK, CPU, timer=watch.timer, compile_all=compile_all)
    assert len(wanted) == len(set(wanted))
    assert {variant.kernel for variant in wanted} >= {*SPECIALISED, *TUNED}
    project, gradient = row_of(table, "project"), row_of(table, "gradient")
    assert not project.get("specialised") and "narrow" not in project and project["warps"] == 8
    assert gradient["specialised"] and gradient["block_n"] == 64
    for phase in ("drift", "pull"):
        assert row_of(table, phase) == row_of(tile_table("sm_90"), phase)
    # Nothing was timed whose kernels were not compiled before, but for what an earlier choice changes.
    assert {variant for variants in watch.timed for variant in variants} <= set(wanted)


@pytest.mark.usefixtures("h200")
def test_a_phase_is_timed_beside_the_best_of_the_phases_before() -> None:
    """The padding of T depends on both."""

    def milliseconds(variants: list[Variant]) -> float:
        return float(variants[0].blocks[1])

    watch = Watch(milliseconds)
    candidates = [plain(128, 32), plain(128, 16)]
    table = tune(SHAPES, RANK, CPU, candidates, timer=watch.timer, compile_all=compile_nothing)
    assert [row_of(table, phase)["block_n"] for phase in ("project", "drift", "gradient")] == [16, 16, 16]


@pytest.mark.usefixtures("h200")
def test_a_refused_candidate_is_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    def compile_all(variants: Sequence[Variant], *_: Any) -> Compiled:
        spilling = {variant for variant in variants if variant.kernel in TUNED and variant.blocks[0] == 32}
        return {v: "spills 8 bytes a thread into local memory" if v in spilling else None for v in variants}

    watch = Watch(lambda variants: float(variants[0].blocks[0]))
    table = tune(SHAPES, RANK, CPU, [plain(32), plain(64)], timer=watch.timer, compile_all=compile_all)
    printed = capsys.readouterr().out
    for phase in ("project", "drift", "gradient"):
        assert row_of(table, phase)["block_m"] == 64
        assert f"{phase}: passed over 32x32x32, 4 warps, 1 stages: spills 8 bytes" in printed
    assert all(variant.blocks[0] != 32 for variants in watch.timed for variant in variants)


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("budget", [20.0, 60.0, 110.0, 1000.0])
@pytest.mark.parametrize("compiling", ["quick", "slow"])
def test_the_budget_is_kept(budget: float, compiling: str, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(lambda variants: float(variants[0].blocks[0]), seconds=1.0)

    def compile_all(variants: Sequence[Variant], _: str, __: torch.device, seconds: float) -> Compiled:
        assert seconds <= 0.6 * budget
        watch.now += seconds if compiling == "slow" else 0.0
        return dict.fromkeys(variants[: 60 if compiling == "slow" else None])

    table = tune(SHAPES, RANK, CPU, timer=watch.timer, compile_all=compile_all, budget=budget, clock=watch.clock)
    assert watch.now <= budget
    assert len(watch.timed) >= len(TUNED)
    untried = [line for line in capsys.readouterr().out.splitlines() if "no time for" in line]
    assert len(untried) == (0 if (budget, compiling) == (1000.0, "quick") else len(TUNED))
    assert all("x" in line and "stages" in line for line in untried)
    assert table.keys() == tile_table("sm_90").keys()


@pytest.mark.usefixtures("h200")
def test_no_time_to_plan_leaves_the_shipped_rows(capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch(lambda _: 1.0)
    wanted: list[Variant] = []

    def clock() -> float:
        # Whatever is looked at takes long.
        watch.now += 1.0
        return watch.now

    def compile_all(variants: Sequence[Variant], *_: Any) -> Compiled:
        wanted.extend(variants)
        return {}

    table = tune(SHAPES, RANK, CPU, timer=watch.timer, compile_all=compile_all, budget=1.0, clock=clock)
    assert table == tile_table("sm_90")
    assert {variant.kernel for variant in wanted} <= {*SPECIALISED, "drift", "reduce", "round"}
    assert capsys.readouterr().out.count("no time for") == len(TUNED)


@pytest.mark.usefixtures("h200")
def test_the_fastest_are_timed_again() -> None:
    calls: dict[int, int] = {}

    def milliseconds(variants: list[Variant]) -> float:
        width = variants[0].blocks[1]
        calls[width] = calls.get(width, 0) + 1
        # 16 was lucky once.
        return 1.0 if (width, calls[width]) == (16, 1) else {16: 4.0, 32: 2.0}.get(width, 3.0)

    watch = Watch(milliseconds)
    candidates = [plain(128, 16), plain(128, 32)]
    table = tune(SHAPES, RANK, CPU, candidates, timer=watch.timer, compile_all=compile_nothing)
    assert row_of(table, "project")["block_n"] == 32


@pytest.mark.usefixtures("h200")
def test_a_gpu_on_which_nothing_runs_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    def milliseconds(variants: list[Variant]) -> float:
        raise RuntimeError("no driver")

    with pytest.raises(RuntimeError, match="no candidate of any phase could be timed") as raised:
        tune(SHAPES, RANK, CPU, [], timer=Watch(milliseconds).timer, compile_all=compile_nothing)
    assert "no driver" in str(raised.value.__cause__)
    assert capsys.readouterr().out.count("the shipped tiles stay") == len(TUNED)


def test_the_command_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command = ["tune", "--model", "smollm2-135m", "--rank", "64", "--output", str(tmp_path / "table.json")]
    with pytest.raises(SystemExit, match="found no GPU"):
        main(command)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    calls: list[tuple[Any, ...]] = []

    def search(*arguments: Any, budget: float) -> dict[str, Any]:
        calls.append((*arguments, budget))
        return {"architecture": "sm_90"}

    monkeypatch.setattr("rpsft_kernels.tools.tune.tune", search)
    assert main([*command, "--budget", "30"]) == main(command) == 0
    layer, gpu = MODELS["smollm2-135m"].layer(), torch.device("cuda")
    assert calls == [(layer, 64, gpu, 30.0), (layer, 64, gpu, 110.0)]
    assert json.loads((tmp_path / "table.json").read_text()) == {"architecture": "sm_90"}


@pytest.mark.parametrize("rank", rank_classes())
@pytest.mark.parametrize("phase", TUNED)
def test_candidates_of_a_specialised_row_fit_its_gpu(phase: str, rank: int) -> None:
    shipped = row_of(tile_table("sm_90"), phase, rank)
    rows = list_candidates(phase, shipped, rank, "sm_90")
    specialised = [row for row in rows if row.get("specialised")]
    assert bool(specialised) == bool(shipped.get("specialised"))
    assert len(rows) - len(specialised) == 30
    assert len({str(row) for row in rows}) == len(rows)
    for row in specialised:
        operands = (2 if phase == "project" else 1) * row["block_m"] + row["block_n"]
        grads = 4 * row["block_m"] * row["block_n"] if phase == "gradient" else 0
        assert 2 * operands * row["block_k"] * row["stages"] + grads <= BY_TABLE["sm_90"].block_shared
        # A consumer's sums take at most half of its 232 registers, and some.
        rows_of_consumer = row["block_m"] if phase == "gradient" else row["block_m"] // 2
        assert row["stages"] >= 2 and rows_of_consumer * row["block_n"] <= 128 * 128
        assert phase == "gradient" or row["block_n"] <= max(32, rank_class(rank) * 2 - 2)
    if specialised:
        names = ("block_m", "block_n", "block_k")
        assert [shipped[name] for name in names] in [[row[name] for name in names] for row in specialised]


def test_other_tables_have_no_specialised_candidates() -> None:
    for architecture in ("sm_80", "sm_100", "gfx942"):
        for phase in TUNED:
            rows = list_candidates(phase, row_of(tile_table(architecture), phase), RANK, architecture)
            assert not any(row.get("specialised") for row in rows)
    assert set(TUNED) == set(PHASES) - {"full"}


@pytest.mark.usefixtures("h200")
def test_a_candidate_that_hangs_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def stall(run: Callable[[], None]) -> float:
        raise Stalled("cuda:0 has not come to the end of its launches")

    def wait(_: Any) -> None:
        raise AssertionError("this would wait for ever")

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    with pytest.raises(Stalled, match=r"project: 128x256x64.* hangs: cuda:0 has not come .*kill -9"):
        tune(SHAPES, RANK, CPU, timer=stall, compile_all=compile_nothing)


class Event:
    """Stands for an event of a GPU whose work lasts as long as the test says."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.time = 0.0

    def record(self) -> None:
        self.time = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.time - self.time


def test_a_call_is_timed_by_the_median_of_many_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in {"Event": Event, "device": lambda _: nullcontext()}.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timers, "wait_for_stream", lambda _: None)
    monkeypatch.setattr(EventTimer, "_FLUSHED", 16)
    timer = EventTimer(CPU)

    def count_runs(milliseconds: float) -> int:
        times: list[float] = []

        def run() -> None:
            # The first runs are slow, and some others.
            times.append(10 * milliseconds if len(times) < 2 or len(times) % 4 == 0 else milliseconds)
            Event.now += times[-1]

        assert timer(run) == pytest.approx(milliseconds)
        return len(times) - 2

    assert [count_runs(milliseconds) for milliseconds in (0.001, 0.2, 100.0)] == [60, 20, 5]


def compile_one(architecture: str, device: torch.device, variant: Variant) -> str | None:
    """Stand for a compiler: the number of warps says what comes of a variant."""
    if variant.warps == 2:
        raise ValueError("does not compile")
    if variant.warps == 8:
        # Longer than any test may take.
        time.sleep(600)
    return "spills" if variant.warps == 1 else None


def squares(*warps: int) -> list[Variant]:
    return [Variant("squares", (("BLOCK", 1024),), number, 1) for number in warps]


def test_variants_are_compiled_in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    variants = squares(4, 1, 2)
    # It ends when all are compiled.
    compiled = compile_variants(variants, "sm_90", CPU, 300.0, compile_one)
    assert [compiled[variant] for variant in variants] == [None, "spills", "ValueError: does not compile"]
    assert compile_variants([], "sm_90", CPU, 300.0) == {}


def test_a_compiler_at_work_is_left_when_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    began = time.monotonic()
    assert compile_variants(squares(8, 4), "sm_90", CPU, 1.0, compile_one) == {}
    assert time.monotonic() - began < 60


_COMPILE = """
import sys
from contextlib import nullcontext
from unittest import mock
import torch, triton
import jitted
from rpsft_kernels.ops.triton.jit import bind_jit
from rpsft_kernels.ops.triton.variants import ARGUMENT_TYPES, ARGUMENTS, Variant, pull_variant, Access, round_variant
from rpsft_kernels.tools.tuning.compiling import compile_as_jit

triton.runtime.driver.set_active(jitted.Driver())
device = torch.device("cuda", 0)
pull = pull_variant("sm_90", "bf16", 32, False, Access(True, True, False), True)
constants = tuple((name, 12 if name == "STAGES" else value) for name, value in pull.constants)
constants = tuple((name, 128 if name == "BLOCK_K" else value) for name, value in constants)
deep = Variant(pull.kernel, constants, 4, 12)
with (
    mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
    mock.patch.object(torch.cuda, "current_device", return_value=0),
    mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
):
    for variant in (round_variant(pull), pull):
        if sys.argv[1] == "compile":
            print(compile_as_jit("sm_90", device, variant))
        else:
            dtypes = [jitted._DTYPES[ARGUMENT_TYPES[name]] for name in ARGUMENTS[variant.kernel]]
            bind_jit(variant, 1, device, tuple(torch.zeros(8, dtype=dtype) for dtype in dtypes))()
    if sys.argv[1] == "compile":
        print(compile_as_jit("sm_90", device, deep))
"""


def test_launches_find_what_was_compiled(tmp_path: Path) -> None:
    """Under the same key of Triton's cache: nothing is written to it when they are made by another process."""
    path = os.pathsep.join([str(Path(jitted.__file__).parent), *sys.path])
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    environment.pop("TRITON_INTERPRET", None)

    def run(what: str) -> list[str]:
        command = [sys.executable, "-c", _COMPILE, what]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        return done.stdout.splitlines()

    good, other, deep = run("compile")
    assert (good, other) == ("None", "None")
    assert "bytes of shared memory, of 232448" in deep
    files = sorted(tmp_path.rglob("*"))
    assert any(path.suffix == ".cubin" for path in files)
    run("launch")
    assert sorted(tmp_path.rglob("*")) == files
