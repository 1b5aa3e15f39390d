"""The benchmarks as a pytest session: its options, its cases, and the file that all providers' figures go to.

python -m pytest benchmarks -o python_files="bench_*.py" [--bench-scale smoke|small|large] [--bench-device cpu|cuda]
    [--bench-output FILE] [--bench-rounds N] [-k CASE]

A test is one case, and fails if this package is wrong there. pytest-benchmark times our first provider in the very
rounds in which all others take their turns; its own options (``--benchmark-json``, ``--benchmark-compare``) follow
that one over versions.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.reporting.recording import Recorder
from benchmarks.reporting.results import SUITES, Result
from benchmarks.suites import cases, machine, measure
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.measure import Clock, Entrant, Rounds, RunCase

_OUTPUT = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rpsft_kernels benchmarks")
    group.addoption("--bench-scale", choices=cases.SCALES, help="large on a GPU and small on a CPU by default")
    group.addoption("--bench-device", choices=machine.DEVICES, default="auto", help="where there is one, a GPU")
    group.addoption("--bench-output", type=Path, metavar="FILE", help="a new file below output/bench/ by default")
    group.addoption("--bench-rounds", type=int, metavar="N", help="of every case, instead of its own number")


def pytest_configure(config: pytest.Config) -> None:
    try:
        machine.choose_device(config.getoption("--bench-device"))
    except ValueError as error:
        raise pytest.UsageError(f"--bench-device: {error}") from error
    rounds = config.getoption("--bench-rounds")
    if rounds is not None and rounds < 1:
        raise pytest.UsageError(f"--bench-rounds: got {rounds}, expected at least 1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    device = machine.choose_device(config.getoption("--bench-device"))
    scale = config.getoption("--bench-scale") or ("large" if device.type == "cuda" else "small")
    rounds = config.getoption("--bench-rounds")
    selected = cases.select(metafunc.module.SUITE, scale, device)
    if rounds is not None:
        selected = [replace(case, rounds=rounds) for case in selected]
    metafunc.parametrize("case", selected, ids=[case.name for case in selected])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The most important suites come first, so that a run that is cut short has them.
    order = [f"bench_{suite}.py" for suite in SUITES]
    items.sort(key=lambda item: order.index(item.path.name) if item.path.name in order else len(order))


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    device = machine.choose_device(config.getoption("--bench-device"))
    machine_info["rpsft_kernels"] = {"device": machine.device_name(device), "versions": machine.versions()}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if _OUTPUT in config.stash:
        terminalreporter.write_line(f"Figures of all providers: {config.stash[_OUTPUT]}")


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> torch.device:
    return machine.choose_device(pytestconfig.getoption("--bench-device"))


@pytest.fixture(scope="session")
def clock(device: torch.device) -> Clock:
    return Clock(device)


@pytest.fixture(scope="session")
def recorder(pytestconfig: pytest.Config, device: torch.device) -> Iterator[Recorder]:
    path = pytestconfig.getoption("--bench-output") or machine.default_output(device)
    recorder = Recorder(path, machine.describe_run(device))
    pytestconfig.stash[_OUTPUT] = path
    yield recorder
    recorder.close()


@pytest.fixture
def run(benchmark: Any, recorder: Recorder, clock: Clock) -> RunCase:
    """Time a case's entrants, record them, and fail where this package is wrong."""

    def run(case: BenchCase, entrants: list[Entrant]) -> list[Result]:
        def around(rounds: Rounds) -> None:
            # Time ours, as the tables have it; without it any other, as pytest-benchmark must time something.
            main = next((entrant for entrant in rounds.entrants if entrant.role == "ours"), rounds.entrants[0])
            benchmark.extra_info["provider"] = main.provider
            benchmark.pedantic(rounds.turn, setup=lambda: rounds.prepare(main), rounds=rounds.count(main))

        results = measure.run(case, entrants, clock, around)
        recorder.write(results)
        medians = {result.provider: statistics.median(result.seconds) for result in results if result.seconds}
        benchmark.extra_info["median_seconds"] = medians
        # Free the memory before the next case needs it.
        for entrant in entrants:
            entrant.steps = []
        wrong = measure.describe_wrong(results)
        assert not wrong, "\n".join(wrong)
        return results

    return run
