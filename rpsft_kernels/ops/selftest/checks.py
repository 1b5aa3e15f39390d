"""One case on one subject: against float64, bit for bit where sums are exact, zero at the anchor, NaN, and again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..dispatch import load
from .cases import Case, Shape
from .exact import ROUNDED, WIDE, Expected, expected_drift, expected_pull, moved
from .inputs import Problem, Source, given, operands_of

# Scales of gradients: a power of two, so that exact numbers stay so.
_SCALES = (2.0, -0.5, 1.0, -4.0)


@dataclass(frozen=True)
class Subject:
    """A backend on a device. ``bitwise``: its results have the same bits wherever its operands lie."""

    backend: str
    device: torch.device
    bitwise: bool = True

    def project(
        self, problems: Sequence[Problem], blocks: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], Tensor]:
        operands = operands_of(problems)
        if blocks is not None:
            operands = operands._replace(blocks=blocks)
        return load(self.backend).project_drift(operands)

    def pull(self, problems: Sequence[Problem], drifts: Sequence[Tensor], scales: Tensor, accumulate: bool) -> None:
        """Into the problems' gradients."""
        operands = operands_of(problems).for_pull_back()
        load(self.backend).pull_back_into(given(problems, "grad"), operands, drifts, scales, accumulate)


@dataclass
class Found:
    """What the checks of a case found. ``worst`` is an error in the units of ``bound``."""

    worst: float = 0.0
    bound: float = 0.0
    repeats: int = 0
    failures: list[str] = field(default_factory=list)


def check_numbers(case: Case, subject: Subject) -> Found:
    """Everything about the numbers of small weights, several in a call."""
    found = Found()
    for check in (_random, _exact, _still, _not_finite):
        for failure in check(case, subject, found):
            found.failures.append(f"{case}: {failure}")
    return found


def _scales(problems: Sequence[Problem], device: torch.device) -> Tensor:
    numbers = [_SCALES[i % len(_SCALES)] for i in range(len(problems))]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _drifts(problems: Sequence[Problem]) -> list[Tensor]:
    """C of each problem; of full anchors nothing."""
    nothing = torch.empty(0, 0, dtype=torch.float32)
    return [nothing if problem.drift is None else problem.drift for problem in problems]


# -- random numbers against float64 ----------------------------------------------------------------------


def _random(case: Case, subject: Subject, found: Found) -> Iterator[str]:
    source = Source(case, subject.device)
    problems = [source.random(shape) for shape in case.small()]
    yield from compared(case, subject, problems, found)


def compared(case: Case, subject: Subject, problems: Sequence[Problem], found: Found) -> Iterator[str]:
    """One call, against float64."""
    if case.operation == "drift":
        _poison(problems, subject.device)
        drifts, squares = subject.project(problems)
        yield from compare_drifts(case, problems, drifts, squares, found)
        return
    scales = _scales(problems, subject.device)
    before = _ready(case, problems)
    subject.pull(problems, _drifts(problems), scales, case.accumulate)
    yield from compare_gradients(case, problems, before, scales.tolist(), found)


def compare_drifts(
    case: Case, problems: Sequence[Problem], drifts: Sequence[Tensor], squares: Tensor, found: Found
) -> Iterator[str]:
    """C against float64, and its square against C."""
    totals = squares.double()
    for i, (problem, drift) in enumerate(zip(problems, drifts, strict=True)):
        if case.form == "full":
            total = moved(problem).square().sum()
        else:
            total = drift.double().square().sum()
            yield from _near(case, f"C of weight {i}, {problem.shape}", drift, expected_drift(problem), 0.0, found)
        error = float((totals[i] - total).abs())
        if not error <= 1e-5 * float(total):
            yield f"||C||^2 of weight {i}, {problem.shape}: got {float(totals[i]):.9g}, expected {float(total):.9g}"


def compare_gradients(
    case: Case, problems: Sequence[Problem], before: Sequence[Tensor], scales: Sequence[float], found: Found
) -> Iterator[str]:
    for i, problem in enumerate(problems):
        assert problem.grad is not None
        if case.form == "full":
            pulled = moved(problem) * scales[i]
            expected = Expected(pulled, pulled.abs())
        else:
            expected = expected_pull(problem, scales[i])
        values = expected.values + before[i].double() if case.accumulate else expected.values
        name = f"G of weight {i}, {problem.shape}"
        yield from _near(case, name, problem.grad, Expected(values, expected.size), _step(problem.grad.dtype), found)


def _step(dtype: torch.dtype) -> float:
    """A number's last rounding."""
    return torch.finfo(dtype).eps


def _near(case: Case, name: str, actual: Tensor, expected: Expected, step: float, found: Found) -> Iterator[str]:
    if not actual.numel():
        return
    bound = ROUNDED if case.rounded else WIDE
    # Beside the error that counts: its rounding to the result's dtype, and the smallest numbers that there are.
    error = (actual.double() - expected.values).abs_()
    allowed = expected.size * bound + expected.values.abs() * step + torch.finfo(actual.dtype).tiny
    ratio = (error / allowed).nan_to_num_(nan=float("inf"), posinf=float("inf")).reshape(-1)
    worst, at = ratio.max(0)
    found.worst, found.bound = max(found.worst, float(worst) * bound), bound
    if float(worst) > 1.0:
        row, col = divmod(int(at), actual.shape[1])
        wrong = int((ratio > 1.0).sum())
        got, exact = float(actual[row, col]), float(expected.values[row, col])
        yield (
            f"{name}: got {got:.6g} at ({row}, {col}), expected {exact:.6g} within {float(allowed[row, col]):.2g}; "
            f"{wrong} of {actual.numel()} numbers are wrong"
        )


def _ready(case: Case, problems: Sequence[Problem]) -> list[Tensor]:
    """What gradients hold before they are added to; what is to be written over is NaN."""
    before = [problem.grad.clone() for problem in problems if problem.grad is not None]
    if not case.accumulate:
        for problem in problems:
            assert problem.grad is not None
            problem.grad.fill_(float("nan"))
    return before


def _poison(problems: Sequence[Problem], device: torch.device) -> None:
    """Fill with NaN what the allocator will most likely hand out for the drifts: a number that is not written shows."""
    for problem in problems:
        if problem.left is not None:
            k = problem.left.shape[1]
            torch.full((k, k), float("nan"), dtype=torch.float32, device=device)


# -- numbers that no order of summation changes -----------------------------------------------------------


def _exact(case: Case, subject: Subject, found: Found) -> Iterator[str]:
    source = Source(case, subject.device, "exact")
    problems = [source.exact(shape, i) for i, shape in enumerate(case.small())]
    if case.operation == "drift":
        _poison(problems, subject.device)
        drifts, _ = subject.project(problems)
        for i, (problem, drift) in enumerate(zip(problems, drifts, strict=True)):
            if case.form == "full":
                continue
            values = expected_drift(replace(problem, block=None)).values.float()
            if problem.block is not None:
                values = values - problem.block
            yield from _equal(f"C of weight {i}, {problem.shape}, one product each", drift, values)
        return
    # On the CPU, from where they travel with the kernels' tables.
    scales = _scales(problems, torch.device("cpu"))
    before = _ready(case, problems)
    subject.pull(problems, _drifts(problems), scales, case.accumulate)
    for i, problem in enumerate(problems):
        assert problem.grad is not None
        scale = float(scales[i])
        pulled = moved(problem) * scale if case.form == "full" else expected_pull(problem, scale).values
        total = pulled.float() + before[i].float() if case.accumulate else pulled.float()
        yield from _equal(
            f"G of weight {i}, {problem.shape}, one product each", problem.grad, total.to(problem.grad.dtype)
        )


def _equal(name: str, actual: Tensor, exact: Tensor) -> Iterator[str]:
    # Minus zero equals zero, NaN nothing.
    wrong = (actual != exact).reshape(-1)
    count = int(wrong.sum())
    if count:
        row, col = divmod(int(wrong.to(torch.uint8).argmax()), actual.shape[1])
        yield (
            f"{name}: got {float(actual[row, col]):.9g} at ({row}, {col}), expected exactly "
            f"{float(exact[row, col]):.9g}; {count} of {actual.numel()} numbers are wrong"
        )


# -- at the anchor, and not finite -------------------------------------------------------------------------


def _still(case: Case, subject: Subject, found: Found) -> Iterator[str]:
    """At W0 the base form's C, full anchors' norm and every gradient are exactly zero. So is the block form's C, with a
    block that the same arithmetic made.
    """
    source = Source(case, subject.device, "still")
    problems = [source.random(shape, still=True) for shape in case.small()]
    if case.operation == "gradient":
        if case.form == "any":
            problems = [replace(p, drift=None if p.drift is None else torch.zeros_like(p.drift)) for p in problems]
        before = _ready(case, problems)
        subject.pull(problems, _drifts(problems), _scales(problems, subject.device), case.accumulate)
        for i, problem in enumerate(problems):
            assert problem.grad is not None
            exact = before[i] if case.accumulate else torch.zeros_like(problem.grad)
            yield from _equal(f"G of weight {i}, {problem.shape}, without a drift", problem.grad, exact)
        return
    if case.form == "bare" or (case.form == "block" and not subject.bitwise):
        return
    blocks = subject.project(problems, [])[0] if case.form == "block" else []
    _poison(problems, subject.device)
    drifts, squares = subject.project(problems, blocks)
    for i, (problem, drift) in enumerate(zip(problems, drifts, strict=True)):
        yield from _equal(f"C of weight {i}, {problem.shape}, at W0", drift, torch.zeros_like(drift))
    if bool(squares.any()):
        yield f"||C||^2 at W0: got {squares.tolist()}, expected zeros"


def _not_finite(case: Case, subject: Subject, found: Found) -> Iterator[str]:
    """One NaN in the middle makes NaN of all that it is part of."""
    source = Source(case, subject.device, "not finite")
    problem = source.random(case.small()[-1])
    matrix = problem.weight if problem.weight is not None else problem.drift
    assert matrix is not None
    row, col = matrix.shape[0] // 2, matrix.shape[1] - 1
    matrix[row, col].fill_(float("nan"))
    if case.operation == "drift":
        drifts, squares = subject.project([problem])
        if not bool(drifts[0].isnan().all()) or not bool(squares.isnan().all()):
            yield f"one NaN in W, {problem.shape}: got {float(squares[0])} for ||C||^2, expected NaN, and C all NaN"
        return
    _ready(case, [problem])
    subject.pull([problem], _drifts([problem]), _scales([problem], subject.device), case.accumulate)
    assert problem.grad is not None
    shown = problem.grad[row, col] if case.form == "full" else problem.grad
    if not bool(shown.isnan().all()):
        yield f"one NaN in {'W' if case.form == 'full' else 'C'}, {problem.shape}: G shows numbers in its place"


# -- the same bits again -----------------------------------------------------------------------------------


def call_once(case: Case, subject: Subject, shape: Shape) -> None:
    """One weight of a shape, for what it launches."""
    problem = Source(case, subject.device).random(shape, still=True)
    if case.operation == "drift":
        subject.project([problem])
    else:
        subject.pull([problem], _drifts([problem]), _scales([problem], subject.device), case.accumulate)


# Different weights in a repeated call: what one has left behind is not another's result.
_DISTINCT = 3


def check_repeats(case: Case, subject: Subject, shape: Shape, copies: int, repeats: int) -> Found:
    """Calls of at least ``copies`` weights of one shape: every weight's result has the same bits in every call and at
    every place of the list; the first call's is compared with float64.
    """
    found = Found(repeats=repeats)
    check = _repeated_drifts if case.operation == "drift" else _repeated_gradients
    for failure in check(case, subject, shape, -(-copies // _DISTINCT), repeats, found):
        found.failures.append(f"{case}: {failure}")
    return found


def _repeated_drifts(
    case: Case, subject: Subject, shape: Shape, rounds: int, repeats: int, found: Found
) -> Iterator[str]:
    source = Source(case, subject.device, "repeated")
    distinct = [source.random(shape) for _ in range(_DISTINCT)]
    first: Tensor | None = None
    differing = torch.zeros((), dtype=torch.int64, device=subject.device)
    for number in range(repeats):
        turn = number % _DISTINCT
        drifts, squares = subject.project((distinct[turn:] + distinct[:turn]) * rounds)
        together = torch.cat([torch.stack(list(drifts)).reshape(len(drifts), -1), squares[:, None]], 1)
        if first is None:
            first = together[:_DISTINCT].clone()
            yield from compare_drifts(case, distinct, drifts[:_DISTINCT], squares[:_DISTINCT], found)
        differing += (together.view(rounds, _DISTINCT, -1) != first.roll(-turn, 0)).any()
    yield from _differing(subject, shape, rounds, repeats, int(differing))


def _repeated_gradients(
    case: Case, subject: Subject, shape: Shape, rounds: int, repeats: int, found: Found
) -> Iterator[str]:
    source = Source(case, subject.device, "repeated")
    distinct = [source.random(shape) for _ in range(_DISTINCT)]
    grads = given(distinct, "grad")
    flipped = case.kind.endswith("transposed")
    before = torch.stack([grad.T if flipped else grad for grad in grads])
    memory = before.repeat(rounds, 1, 1)
    targets = [grad.T if flipped else grad for grad in memory]
    scales = torch.tensor(_SCALES[:_DISTINCT], dtype=torch.float32, device=subject.device)
    first: Tensor | None = None
    differing = torch.zeros((), dtype=torch.int64, device=subject.device)
    for number in range(repeats):
        turn = number % _DISTINCT
        if case.accumulate:
            memory.view(rounds, *before.shape).copy_(before.roll(-turn, 0))
        else:
            memory.fill_(float("nan"))
        problems = (distinct[turn:] + distinct[:turn]) * rounds
        problems = [replace(problem, grad=grad) for problem, grad in zip(problems, targets, strict=True)]
        subject.pull(problems, _drifts(problems), scales.roll(-turn, 0).repeat(rounds), case.accumulate)
        if first is None:
            first = memory[:_DISTINCT].clone()
            yield from compare_gradients(case, problems[:_DISTINCT], grads, list(_SCALES), found)
        differing += (memory.view(rounds, *before.shape) != first.roll(-turn, 0)).any()
    yield from _differing(subject, shape, rounds, repeats, int(differing))


def _differing(subject: Subject, shape: Shape, rounds: int, repeats: int, differing: int) -> Iterator[str]:
    if differing and subject.bitwise:
        yield (
            f"{differing} of {repeats} calls gave other bits than the first with the same operands "
            f"({rounds * _DISTINCT} weights, {shape})"
        )
