"""The measurement: a provider that is wrong is not timed, all others take turns, and the file records both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.reporting.reading import load
from benchmarks.reporting.recording import Recorder
from benchmarks.reporting.results import SUITES, Role
from benchmarks.suites import machine, measure, memory, providers, subspaces
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.layer import Layer
from benchmarks.suites.measure import Clock, Entrant, Rounds
from benchmarks.suites.providers import GEMM, PLAIN, Provider, Step, ours_name

CPU = torch.device("cpu")
CASE = BenchCase("layer", "toy", ((48, 64), (64, 48)), 16, torch.bfloat16, rounds=3)
ROOT = Path(__file__).parents[3]


class CountingClock(Clock):
    """No time passes: each turn takes as many seconds as turns were taken before it, and 1."""

    def __init__(self) -> None:
        super().__init__(CPU)
        self.taken = 0
        self.flushes = 0

    def flush(self) -> None:
        self.flushes += 1

    def seconds(self, step: Step) -> float:
        step()
        self.taken += 1
        return float(self.taken)


@pytest.fixture
def clock() -> CountingClock:
    return CountingClock()


# -- rounds ------------------------------------------------------------------------------------------------------


def _entrants(
    names: str, log: list[tuple[str, int]], copies: int = 2, step_seconds: Sequence[float] = ()
) -> list[Entrant]:
    def step(name: str, copy: int) -> Callable[[], None]:
        return lambda: log.append((name, copy))

    found = []
    for i, name in enumerate(names):
        entrant = Entrant(name, "plain", steps=[step(name, copy) for copy in range(copies)])
        entrant.step_seconds = step_seconds[i] if step_seconds else 0.0
        found.append(entrant)
    return found


def test_all_take_turns_and_the_order_rotates(clock: CountingClock) -> None:
    log: list[tuple[str, int]] = []
    entrants = _entrants("abc", log)
    Rounds(entrants, clock, rounds=4, budget=1.0).finish()
    assert "".join(name for name, _ in log) == "abcbcacababc"
    # Nobody always meets the same layer, and neighbours of a round differ where they can.
    for entrant in entrants:
        assert [copy for name, copy in log if name == entrant.provider] in ([0, 1, 0, 1], [1, 0, 1, 0])
        assert len(entrant.seconds) == 4
    # Every turn finds caches that somebody else has overwritten.
    assert clock.flushes == len(log)
    # Entry i is round i's.
    assert [sorted(one.seconds[i] for one in entrants) for i in range(4)] == [
        [1, 2, 3],
        [4, 5, 6],
        [7, 8, 9],
        [10, 11, 12],
    ]


def test_the_order_is_the_same_when_somebody_else_times_one_of_them(clock: CountingClock) -> None:
    logs = []
    for main in (None, 0, 1, 2):
        log: list[tuple[str, int]] = []
        entrants = _entrants("abc", log)
        rounds = Rounds(entrants, clock, rounds=3, budget=1.0)
        if main is not None:
            # pytest-benchmark does the same.
            for _ in range(rounds.count(entrants[main])):
                rounds.prepare(entrants[main])
                before = len(log)
                rounds.turn()
                assert [name for name, _ in log[before:]] == [entrants[main].provider]
        rounds.finish()
        assert all(len(entrant.seconds) == 3 for entrant in entrants)
        logs.append(log)
    assert all(log == logs[0] for log in logs)


def test_who_is_slow_takes_part_in_the_first_rounds_only(clock: CountingClock) -> None:
    log: list[tuple[str, int]] = []
    entrants = _entrants("abc", log, step_seconds=[0.1, 0.5, 7.0])
    Rounds(entrants, clock, rounds=4, budget=1.0).finish()
    assert [len(entrant.seconds) for entrant in entrants] == [4, 2, 1]
    assert "".join(name for name, _ in log) == "abcbaaa"


def test_who_has_no_steps_takes_no_turn(clock: CountingClock) -> None:
    log: list[tuple[str, int]] = []
    entrants = _entrants("ab", log)
    entrants[0].reject("wrong", "on purpose")
    Rounds(entrants, clock, rounds=2, budget=1.0).finish()
    assert [name for name, _ in log] == ["b", "b"] and entrants[0].seconds == []


# -- correctness -------------------------------------------------------------------------------------------------


@dataclass
class Sabotaged:
    """A provider of ours whose gradient is off, or that fails, or whose penalty is not 0; it counts its steps."""

    factor: float = 1.0
    penalty: float = 0.0
    failure: Exception | None = None
    calls: int = 0

    def prepare(self, layer: Layer) -> Step:
        right = next(
            one for one in providers.providers(CPU, layer.weights[0].dtype, compiling=False) if one.name == PLAIN
        )
        step = right(layer)

        def sabotaged() -> Tensor | None:
            self.calls += 1
            if self.failure is not None:
                raise self.failure
            step()
            for weight in layer.weights:
                assert weight.grad is not None
                weight.grad.mul_(self.factor)
            return torch.tensor(self.penalty)

        return sabotaged

    def provider(self, role: Role = "ours", bound: float | None = 0.02) -> Provider:
        return Provider("sabotaged", role, self.prepare, bound)


def _timed(case: BenchCase, found: Sequence[Provider], clock: Clock) -> dict[str, measure.Result]:
    entrants = measure.enter(case, found, clock)
    return {result.provider: result for result in measure.run(case, entrants, clock)}


@pytest.mark.parametrize("factor", [1.1, float("nan")])
def test_a_wrong_gradient_is_reported_and_never_timed(factor: float, clock: CountingClock) -> None:
    sabotaged = Sabotaged(factor)
    honest = next(one for one in providers.providers(CPU, CASE.dtype, compiling=False) if one.name == PLAIN)
    entrants = measure.enter(CASE, [sabotaged.provider(), honest], clock)
    before = sabotaged.calls
    found = {result.provider: result for result in measure.run(CASE, entrants, clock)}
    assert sabotaged.calls == before
    result = found["sabotaged"]
    assert result.status == "wrong" and result.seconds == () and result.error_bound == 0.02
    assert result.error is not None and not result.error <= 0.02
    assert "gradient error" in result.why
    assert measure.describe_wrong([result]) == [f"layer, toy, sabotaged: {result.why}"]
    # The others are.
    assert found[PLAIN].status == "timed" and len(found[PLAIN].seconds) == 3
    assert not measure.describe_wrong([found[PLAIN]])


def test_without_a_bound_the_error_is_recorded_and_the_time_too(clock: CountingClock) -> None:
    result = _timed(CASE, [Sabotaged(1.1).provider("published", bound=None)], clock)["sabotaged"]
    assert result.status == "timed" and len(result.seconds) == 3 and result.error == pytest.approx(0.1, abs=0.02)


def test_ours_is_wrong_unless_its_penalty_is_zero_at_the_anchor(clock: CountingClock) -> None:
    ours = _timed(CASE, [Sabotaged(penalty=1e-12).provider()], clock)["sabotaged"]
    assert ours.status == "wrong" and "at the anchor" in ours.why and ours.penalty_at_anchor == pytest.approx(1e-12)
    theirs = _timed(CASE, [Sabotaged(penalty=1e-12).provider("published", None)], clock)["sabotaged"]
    assert theirs.status == "timed" and theirs.penalty_at_anchor == pytest.approx(1e-12)


@pytest.mark.parametrize(
    ("failure", "role", "status", "why"),
    [
        (RuntimeError("broken\nsecond line"), "ours", "wrong", "RuntimeError: broken"),
        (RuntimeError("broken"), "published", "not run", "RuntimeError: broken"),
        (torch.OutOfMemoryError("too much"), "ours", "not run", "out of memory"),
    ],
)
def test_who_fails_costs_nobody_else_its_figures(
    failure: Exception, role: Role, status: str, why: str, clock: CountingClock
) -> None:
    honest = next(one for one in providers.providers(CPU, CASE.dtype, compiling=False) if one.name == PLAIN)
    found = _timed(CASE, [Sabotaged(failure=failure).provider(role), honest], clock)
    assert (found["sabotaged"].status, found["sabotaged"].why) == (status, why)
    assert found[PLAIN].status == "timed"


def test_who_cannot_run_is_never_prepared(clock: CountingClock, monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged = Sabotaged()
    found = _timed(CASE, [replace(sabotaged.provider(), why_not="no compiler")], clock)["sabotaged"]
    assert (found.status, found.why) == ("not run", "no compiler")
    monkeypatch.setattr(clock, "product_rate", lambda dtype: 1e3)
    slow = replace(sabotaged.provider(), products=torch.float16)
    found = _timed(CASE, [slow], clock)["sabotaged"]
    assert found.status == "not run" and "float16 products run at 0.0 GFLOP/s here" in found.why
    assert sabotaged.calls == 0


def test_the_rate_of_products_is_measured() -> None:
    clock = Clock(CPU)
    assert clock.product_rate(torch.float32) > 0
    assert clock.product_rate(torch.float32) == clock.product_rate(torch.float32)


def test_gradients_are_clear_before_the_rounds(clock: CountingClock) -> None:
    layers: list[Layer] = []

    def prepare(layer: Layer) -> Step:
        layers.append(layer)
        return Sabotaged().prepare(layer)

    measure.enter(CASE, [Provider("watched", "plain", prepare)], clock)
    assert len(layers) == CASE.copies
    for weight in (weight for layer in layers for weight in layer.weights):
        assert weight.grad is not None and not weight.grad.any()


def test_an_anchor_that_captures_too_little_is_wrong(clock: CountingClock, monkeypatch: pytest.MonkeyPatch) -> None:
    case = BenchCase("anchors", "toy", ((48, 64),), 16, torch.bfloat16, copies=1, rounds=2)
    names = list(subspaces.METHODS)

    def lazy(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        return torch.linalg.qr(weight.float())[0][:, :rank], torch.linalg.qr(weight.float().T)[0][:, :rank]

    right = measure.run(case, subspaces.enter(case, clock), clock)
    assert [result.status for result in right] == ["timed"] * 3 and all(len(result.seconds) == 2 for result in right)
    exact = right[names.index("torch.linalg.svd, fp32")].energy
    values = torch.linalg.svdvals(subspaces.make_decaying((48, 64), torch.bfloat16, CPU).double()).square()
    assert exact == pytest.approx(float(values[:16].sum() / values.sum()), rel=1e-4)
    monkeypatch.setitem(subspaces.METHODS, names[0], ("ours", lazy, subspaces.MAX_SHORTFALL))
    wrong = measure.run(case, subspaces.enter(case, clock), clock)[0]
    assert wrong.status == "wrong" and wrong.seconds == () and wrong.energy is not None and wrong.energy < 0.9 * exact


# -- time, launches, memory ----------------------------------------------------------------------------------------


def test_the_clock_of_a_cpu_times_a_step_and_has_no_host() -> None:
    clock, log = Clock(CPU), []
    clock.flush()
    assert clock.seconds(lambda: log.append(1)) > 0 and log == [1]  # type: ignore[func-returns-value]
    assert clock.host_seconds(lambda: None) is None and measure.count_launches(lambda: None, CPU) is None


@dataclass
class Event:
    key: str
    count: int
    device_type: object
    is_user_annotation: bool = False


def test_kernels_are_counted_and_nothing_else() -> None:
    gpu, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    events = [
        Event("project_kernel", 3, gpu),
        Event("aten::mm", 5, cpu),
        Event("Memcpy HtoD (Pageable -> Device)", 7, gpu),
        Event("Memset (Device)", 11, gpu),
        Event("Torch-Compiled Region", 13, gpu, is_user_annotation=True),
        Event("gemm", 2, gpu),
    ]
    assert measure.count_kernels(events) == 5


@pytest.mark.skipif(not memory.is_supported(), reason="the peak is Linux's")
def test_memory_of_a_step_is_what_it_holds_at_its_peak(clock: CountingClock) -> None:
    case = replace(CASE, shapes=((1024, 2048),), rank=32, memory=True, only=(ours_name("torch", "base"), PLAIN, GEMM))
    found = {
        one.provider: one for one in measure.enter(case, providers.providers(CPU, case.dtype, compiling=False), clock)
    }
    # A bfloat16 drift as large as the weight; of ours, pieces of it.
    whole, ours = found[PLAIN].extra_bytes, found[ours_name("torch", "base")].extra_bytes
    assert whole is not None and 2 * case.elements <= whole < 8 * case.elements
    assert ours is not None and ours < 8 * case.elements
    assert found[GEMM].extra_bytes is None


# -- the file ------------------------------------------------------------------------------------------------------


def test_lines_are_those_that_the_report_reads(tmp_path: Path, clock: CountingClock) -> None:
    path = tmp_path / "new" / "run.jsonl"
    recorder = Recorder(path, machine.describe_run(CPU, "python benchmark"))
    sabotaged = Sabotaged(float("nan"))
    found = [sabotaged.provider(), *providers.providers(CPU, CASE.dtype, compiling=False)]
    written = measure.run(CASE, measure.enter(CASE, found, clock), clock)
    recorder.write(written)
    recorder.close()
    read = load(path)
    assert read.run.device_type == "cpu" and read.run.command == "python benchmark" and read.run.bandwidth > 0
    assert read.run.threads == torch.get_num_threads() and read.run.versions["torch"] == torch.__version__
    # The wrong one's error is NaN, which equals nothing.
    assert read.results[1:] == tuple(written[1:])
    assert read.results[0].status == "wrong" and read.results[0].error != read.results[0].error


def test_a_file_of_another_run_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("figures")
    with pytest.raises(FileExistsError):
        Recorder(path, {})
    assert path.read_text() == "figures"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="'cuda', but torch sees no GPU"):
        machine.choose_device("cuda")
    with pytest.raises(SystemExit) as caught:
        machine.main(["--device", "cuda"])
    assert caught.value.code == 2 and "torch sees no GPU" in capsys.readouterr().err
    assert machine.main([]) == 0
    assert capsys.readouterr().out.strip().endswith(".jsonl")


def _session(output: Path, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks", "-o", "python_files=bench_*.py", "--bench-scale", "smoke"]
    command += ["--bench-device", "cpu", "--bench-output", str(output), "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(path or "")}
    # A worker of pytest-xdist tells those below it that they are workers too.
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_session_measures_every_suite(tmp_path: Path) -> None:
    output = tmp_path / "smoke.jsonl"
    done = _session(output)
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(output) in done.stdout
    read = load(output)
    # The most important suite comes first.
    assert list(dict.fromkeys(case.suite for case in read.cases)) == list(SUITES)
    for case in read.cases:
        statuses = {result.provider: result.status for result in case.results}
        assert "wrong" not in statuses.values()
        assert case.ours is not None and len(case.ours.seconds) == 2
        assert case.suite == "anchors" or case.gemm is not None


def test_a_session_is_red_where_ours_is_wrong(tmp_path: Path) -> None:
    output = tmp_path / "red.jsonl"
    (tmp_path / "sabotage.py").write_text(
        "import rpsft_kernels as rk\nright = rk.accumulate_rotation_grad_\n"
        "rk.accumulate_rotation_grad_ = lambda weights, anchors, coeff: right(weights, anchors, 1.1 * coeff)\n"
    )
    done = _session(output, "-p", "sabotage", "-k", "layer and bfloat16", path=tmp_path)
    assert done.returncode == 1 and "gradient error 0.1, expected at most 0.01" in done.stdout
    found = {result.provider: result.status for result in load(output).results}
    assert found[ours_name("torch", "base")] == "wrong"
    assert found[ours_name("torch", "base", autograd=True)] == "timed" == found[PLAIN]
