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
from rpsft_kernels.ops.selftest.cases import Case
from rpsft_kernels.ops.selftest.checks import Subject
from rpsft_kernels.ops.selftest.report import table
from rpsft_kernels.ops.selftest.subjects import jobs
from rpsft_kernels.ops.selftest.suite import Result, run
from rpsft_kernels.ops.triton import launch
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH
from rpsft_kernels.ops.triton.variants import ARGUMENTS, Variant

CPU = torch.device("cpu")
HALF = torch.bfloat16
CASES = {
    "drift": Case("drift", "base", HALF, HALF, HALF, None, 32, "ragged", False),
    "gradient": Case("gradient", "any", None, None, HALF, HALF, 32, "ragged", True, True),
    "full": Case("gradient", "full", HALF, HALF, None, torch.float32, 0, "odd", False),
}
BACKENDS = [
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(bool(native.missing()), reason=str(native.missing()))),
]
FAULTS = ("wrong offset", "missing tile", "random bit")


def tried(backend: str, *cases: Case) -> Result:
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


def of_cpu(name: str, quick: bool) -> list[Any]:
    found, _ = jobs(CPU, quick)
    return [job for job in found if job.title.startswith(name)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_quick_part_passes(backend: str) -> None:
    found = of_cpu(backend, quick=True)
    assert len(found) == (len(native.instruction_sets()) if backend == "native" else 1)
    for job in found:
        result = job.run()
        assert result.failures == [], job.title
        assert sum(line.cases for line in result.lines.values()) == len(job.cases)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cases_of_every_group_pass(backend: str) -> None:
    """One of each form and dtypes, of another kind of layout, orientation and rank each time."""
    for job in of_cpu(backend, quick=False):
        groups: dict[tuple[str, ...], list[Case]] = {}
        for case in job.cases:
            groups.setdefault(case.group, []).append(case)
        job.cases[:] = [members[5 * i % len(members)] for i, members in enumerate(groups.values())]
        result = job.run()
        assert result.failures == [], job.title
        assert len(result.lines) == len(groups) > 60


@interpreted
@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("name", CASES)
def test_interpreted_kernels_pass(name: str) -> None:
    result = tried("triton", CASES[name])
    assert result.failures == []
    assert result.kernels is not None
    assert result.kernels[0] >= 2 or name == "full"


# -- and one that is not ---------------------------------------------------------------------------------------


def wrong(fault: str, tensor: Tensor, before: Tensor, calls: list[int]) -> None:
    """Plant a fault in a result."""
    calls.append(1)
    if not tensor.numel():
        return
    if fault == "wrong offset":
        tensor.copy_(tensor.roll(1, 1) if tensor.shape[1] > 1 else tensor.roll(1, 0))
    elif fault == "missing tile":
        tensor[-8:, -8:] = before[-8:, -8:]
    elif len(calls) % 3 == 0:
        # The highest bit of the fraction: what cannot be compared bit for bit must see it too.
        bits = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        flipped = torch.zeros((), dtype=bits) + (1 << (6 if tensor.dtype == HALF else 22))
        tensor[0, 0].copy_((tensor[0, 0].view(bits) ^ flipped).view(tensor.dtype))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wrong_backend_fails(backend: str, name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = {"torch": reference, "native": native}[backend]
    project, pull = module.project_drift, module.pull_back_into
    calls: list[int] = []

    def wrong_project(*arguments: Any) -> tuple[list[Tensor], Tensor]:
        drifts, squares = project(*arguments)
        wrong(fault, drifts[-1], torch.zeros_like(drifts[-1]), calls)
        return drifts, squares

    def wrong_pull(grads: Sequence[Tensor], *arguments: Any) -> None:
        before = grads[-1].clone()
        pull(grads, *arguments)
        wrong(fault, grads[-1], before, calls)

    monkeypatch.setattr(module, "project_drift", wrong_project)
    monkeypatch.setattr(module, "pull_back_into", wrong_pull)
    result = tried(backend, CASES[name])
    assert result.failures, f"{len(calls)} calls"
    assert not result.passed
    assert str(CASES[name]) in result.failures[0]
    printed = table(result, "a wrong one")
    assert "FAILED" in printed and result.failures[0] in printed


Start = Callable[[], None]
FindStart = Callable[[Variant, int, torch.device, tuple[Tensor, ...]], Start]


def plant_fault(find: FindStart, kernel: str, fault: str) -> FindStart:
    """``find`` with a fault planted in one kernel's launches."""
    calls: list[int] = []

    def planted(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> Start:
        if variant.kernel != kernel:
            return find(variant, programs, device, arguments)

        def start() -> None:
            calls.append(1)
            named = dict(zip(ARGUMENTS[kernel], (argument.clone() for argument in arguments), strict=True))
            fields = named["table"].view(-1, WIDTH)
            if fault == "wrong offset":
                # One element too far, at the first of the weights.
                piece = {
                    "project": "WEIGHT",
                    "drift": "LEFT",
                    "pull": "DRIFT",
                    "gradient": "RIGHT",
                    "full_gradient": "BASE",
                }
                fields[0, INDEX[piece[kernel]]] += 4 if kernel == "pull" else 2
            if fault == "missing tile":
                named["runs"].view(-1, 3)[-1, 2] -= 1
            # What is not the planted argument is the caller's: kernels write to some of them.
            changed = tuple(
                named[name] if name in ("table", "runs") else argument
                for name, argument in zip(ARGUMENTS[kernel], arguments, strict=True)
            )
            find(variant, programs, device, changed)()
            if fault == "random bit" and len(calls) % 3 == 0:
                column = {"project": "PLANES", "drift": "DRIFT", "pull": "PLANES"}.get(kernel, "GRAD")
                address = int(fields[0, INDEX[column]])
                ctypes.c_uint8.from_address(address).value ^= 1

        return start

    return planted


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
    # What is not written holds what was there before: another case's numbers.
    result = tried("triton", CASES[name])
    assert result.failures
    assert str(CASES[name]) in result.failures[0]
    assert f"{kernel}(" in result.failures[0].split("launched were", 1)[1]


@interpreted
@pytest.mark.usefixtures("small_weights")
@pytest.mark.parametrize("form", ["bare", "gradient"])
def test_a_lost_part_fails(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third bfloat16 part of an intermediate is below every bound, but not below equality."""
    find = launch.find_start

    def losing(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> Start:
        start = find(variant, programs, device, arguments)
        if variant.kernel not in ("project", "pull"):
            return start

        def start_and_lose() -> None:
            start()
            for row in arguments[0].view(-1, WIDTH).tolist():
                size = 2 * row[INDEX["PLANES_ROW"]] * row[INDEX["PLANES_ROWS"]]
                ctypes.memset(row[INDEX["PLANES"]] + 2 * size, 0, size)

        return start_and_lose

    wide = torch.float32
    case = Case("drift", "bare", wide, None, HALF, None, 32, "ragged", False)
    if form == "gradient":
        case = Case("gradient", "any", None, None, wide, wide, 32, "ragged", False)
    assert tried("triton", case).passed
    monkeypatch.setattr(launch, "find_start", losing)
    result = tried("triton", case)
    assert result.failures and all("expected exactly" in failure for failure in result.failures)


@interpreted
@pytest.mark.usefixtures("small_weights")
def test_a_kernel_that_is_not_there_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    find = launch.find_start

    def refusing(variant: Variant, *arguments: Any) -> Start:
        if variant.kernel == "project":
            raise ValueError(f"{variant.label()} is not launched: its compiler is not to be trusted")
        return find(variant, *arguments)

    monkeypatch.setattr(launch, "find_start", refusing)
    result = tried("triton", CASES["drift"], CASES["full"])
    assert result.passed
    assert [variant.kernel for variant in result.absent] == ["project"]
    printed = table(result, "one that lacks a kernel")
    assert "1 kernels are not in this installation, and were not tested: a kernel is not launched" in printed


@interpreted
@pytest.mark.usefixtures("small_weights")
def test_an_error_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(launch, "find_start", lambda *_: broken)
    result = tried("triton", CASES["drift"])
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
    (job,) = of_cpu("torch", quick=True)
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
