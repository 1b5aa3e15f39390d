"""The self-test passes on every backend here, and fails on one that was made wrong on purpose."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels.ops import native, reference
from rpsft_kernels.ops.selftest import cases
from rpsft_kernels.ops.selftest.cases import SelfTestCase
from rpsft_kernels.ops.selftest.checks import Subject
from rpsft_kernels.ops.selftest.report import format_table
from rpsft_kernels.ops.selftest.subjects import list_jobs
from rpsft_kernels.ops.selftest.suite import SelfTestResult, run
from rpsft_kernels.ops.triton import launch
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH
from rpsft_kernels.ops.triton.variants import ARGUMENTS, Variant

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
CASES = {
    "drift": SelfTestCase(
        operation="drift", form="base", weight=BF16, base=BF16, basis=BF16, rank=32, kind="ragged", tall=False
    ),
    "gradient": SelfTestCase(
        operation="gradient", form="any", basis=BF16, grad=BF16, rank=32, kind="ragged", tall=True, accumulate=True
    ),
    "full": SelfTestCase(
        operation="gradient", form="full", weight=BF16, base=BF16, grad=FP32, rank=0, kind="odd", tall=False
    ),
}
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.missing()), reason=str(native.missing()))),
]
FAULTS = ("wrong offset", "missing tile", "random bit")


def run_cases(backend: str, *cases: SelfTestCase) -> SelfTestResult:
    return run(Subject(backend, CPU, bitwise=backend != "torch"), cases, complete=False, repeats=4)


# Faults are planted in the host's memory.
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted where there is no GPU")


@pytest.fixture
def small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes long over every tile."""
    sizes = {"ragged": ((8, 40), (40, 72)), "odd": ((3, 5), (33, 65))}
    monkeypatch.setattr(cases, "_SMALL", sizes)
    monkeypatch.setattr(cases, "_MODEST", {kind: shapes[-1] for kind, shapes in sizes.items()})


# -- backends that are right ---------------------------------------------------------------------------------


def list_cpu_jobs(name: str, quick: bool) -> list[Any]:
    jobs, _ = list_jobs(CPU, quick)
    return [job for job in jobs if job.title.startswith(name)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_quick_part_passes(backend: str) -> None:
    jobs = list_cpu_jobs(backend, quick=True)
    assert len(jobs) == (len(native.instruction_sets()) if backend == "native" else 1)
    for job in jobs:
        result = job.run()
        assert result.failures == [], job.title
        assert sum(line.cases for line in result.lines.values()) == len(job.cases)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_case_of_every_line_passes(backend: str) -> None:
    """One case of each operation, form and dtypes, each with another layout, orientation and rank."""
    for job in list_cpu_jobs(backend, quick=False):
        lines: dict[tuple[str, ...], list[SelfTestCase]] = {}
        for case in job.cases:
            lines.setdefault(case.line_key, []).append(case)
        job.cases[:] = [members[5 * i % len(members)] for i, members in enumerate(lines.values())]
        result = job.run()
        assert result.failures == [], job.title
        assert len(result.lines) == len(lines) > 60


@interpreted
@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_pass(name: str) -> None:
    result = run_cases("triton", CASES[name])
    assert result.failures == []
    assert result.kernels is not None
    assert result.kernels[0] >= 2 or name == "full"


# -- and one that is not ---------------------------------------------------------------------------------------


def spoil(fault: str, tensor: Tensor, before: Tensor, calls: list[int]) -> None:
    """Plant a fault in a result."""
    calls.append(1)
    if not tensor.numel():
        return
    if fault == "wrong offset":
        tensor.copy_(tensor.roll(1, 1) if tensor.shape[1] > 1 else tensor.roll(1, 0))
    elif fault == "missing tile":
        tensor[-8:, -8:] = before[-8:, -8:]
    elif len(calls) % 3 == 0:
        # The highest bit of the fraction, which comparisons with a bound must see too.
        bits = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        flipped = torch.zeros((), dtype=bits) + (1 << (6 if tensor.dtype == BF16 else 22))
        tensor[0, 0].copy_((tensor[0, 0].view(bits) ^ flipped).view(tensor.dtype))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_backend_fails(backend: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = {"torch": reference, "native": native}[backend]
    project, pull = module.project_drift, module.pull_back_into
    calls: list[int] = []

    def project_wrongly(*arguments: Any) -> tuple[list[Tensor], Tensor]:
        drifts, squares = project(*arguments)
        spoil(fault, drifts[-1], torch.zeros_like(drifts[-1]), calls)
        return drifts, squares

    def pull_wrongly(grads: Sequence[Tensor], *arguments: Any) -> None:
        before = grads[-1].clone()
        pull(grads, *arguments)
        spoil(fault, grads[-1], before, calls)

    monkeypatch.setattr(module, "project_drift", project_wrongly)
    monkeypatch.setattr(module, "pull_back_into", pull_wrongly)
    result = run_cases(backend, CASES[name])
    assert result.failures, f"{len(calls)} calls"
    assert not result.passed
    assert str(CASES[name]) in result.failures[0]
    printed = format_table(result, "a wrong one")
    assert "FAILED" in printed and result.failures[0] in printed


Start = Callable[[], None]
FindStart = Callable[[Variant, int, torch.device, tuple[Tensor, ...]], Start]


def plant_fault(find: FindStart, kernel: str, fault: str) -> FindStart:
    """Return ``find`` with a fault planted in one kernel's launches."""
    calls: list[int] = []

    def find_and_plant(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> Start:
        if variant.kernel != kernel:
            return find(variant, programs, device, arguments)

        def start() -> None:
            calls.append(1)
            named = dict(zip(ARGUMENTS[kernel], (argument.clone() for argument in arguments), strict=True))
            fields = named["table"].view(-1, WIDTH)
            if fault == "wrong offset":
                # The address of the first weight's piece is one element too far.
                column = {
                    "project": "WEIGHT",
                    "drift": "LEFT",
                    "pull": "DRIFT",
                    "gradient": "RIGHT",
                    "full_gradient": "BASE",
                }
                fields[0, INDEX[column[kernel]]] += 4 if kernel == "pull" else 2
            if fault == "missing tile":
                named["runs"].view(-1, 3)[-1, 2] -= 1
            # All other arguments are the caller's own, because kernels write to some of them.
            changed = tuple(
                named[name] if name in ("table", "runs") else argument
                for name, argument in zip(ARGUMENTS[kernel], arguments, strict=True)
            )
            find(variant, programs, device, changed)()
            if fault == "random bit" and len(calls) % 3 == 0:
                result = {"project": "PLANES", "drift": "DRIFT", "pull": "PLANES"}.get(kernel, "GRAD")
                address = int(fields[0, INDEX[result]])
                ctypes.c_uint8.from_address(address).value ^= 1

        return start

    return find_and_plant


@interpreted
@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("drift", "project"),
        ("drift", "drift"),
        ("gradient", "pull"),
        ("gradient", "gradient"),
        ("full", "full_gradient"),
    ],
)
def test_a_wrong_kernel_fails(name: str, kernel: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "find_start", plant_fault(launch.find_start, kernel, fault))
    result = run_cases("triton", CASES[name])
    assert result.failures
    assert str(CASES[name]) in result.failures[0]
    assert f"{kernel}(" in result.failures[0].split("launched were", 1)[1]


@interpreted
@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("form", ["bare", "gradient"])
def test_a_lost_part_fails(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third bfloat16 part of an intermediate is below every bound, but not below equality."""
    find = launch.find_start

    def find_and_lose(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> Start:
        start = find(variant, programs, device, arguments)
        if variant.kernel not in ("project", "pull"):
            return start

        def start_and_lose() -> None:
            start()
            for row in arguments[0].view(-1, WIDTH).tolist():
                size = 2 * row[INDEX["PLANES_ROW"]] * row[INDEX["PLANES_ROWS"]]
                ctypes.memset(row[INDEX["PLANES"]] + 2 * size, 0, size)

        return start_and_lose

    case = SelfTestCase(operation="drift", form="bare", weight=FP32, basis=BF16, rank=32, kind="ragged", tall=False)
    if form == "gradient":
        case = SelfTestCase(operation="gradient", form="any", basis=FP32, grad=FP32, rank=32, kind="ragged", tall=False)
    assert run_cases("triton", case).passed
    monkeypatch.setattr(launch, "find_start", find_and_lose)
    result = run_cases("triton", case)
    assert result.failures and all("expected exactly" in failure for failure in result.failures)


@interpreted
@pytest.mark.usefixtures("small_weights")
def test_a_kernel_that_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    find = launch.find_start

    def refuse_project(variant: Variant, *arguments: Any) -> Start:
        if variant.kernel == "project":
            raise ValueError(f"{variant.label()} is not launched: its compiler is not to be trusted")
        return find(variant, *arguments)

    monkeypatch.setattr(launch, "find_start", refuse_project)
    result = run_cases("triton", CASES["drift"], CASES["full"])
    assert result.passed
    assert [variant.kernel for variant in result.absent] == ["project"]
    printed = format_table(result, "one that lacks a kernel")
    assert "1 kernels are not in this installation, and were not tested: a kernel is not launched" in printed


@interpreted
@pytest.mark.usefixtures("small_weights")
def test_an_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(launch, "find_start", lambda *_: fail)
    result = run_cases("triton", CASES["drift"])
    assert [failure.split(": ", 1)[1] for failure in result.failures] == [
        "RuntimeError: an illegal memory access was encountered"
    ]


@interpreted
@pytest.mark.usefixtures("small_weights")
def test_kernels_that_no_case_launches_are_failures() -> None:
    result = run(Subject("triton", CPU), [CASES["full"]], complete=True, repeats=1)
    missed = [failure for failure in result.failures if "was never launched: the self-test is not complete" in failure]
    assert len(missed) > 100


# -- whatever the caller's state -------------------------------------------------------------------------------


def test_the_callers_state_neither_disturbs_nor_is_disturbed() -> None:
    (job,) = list_cpu_jobs("torch", quick=True)
    del job.cases[2:]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
            result = job.run()
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_default_dtype(torch.float32)
    assert result.failures == []
    assert torch.equal(torch.get_rng_state(), state)
