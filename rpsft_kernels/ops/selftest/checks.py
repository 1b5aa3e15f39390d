"""The checks of one case on one subject: against float64, bit for bit where sums are exact, at the anchor, with NaN,
and for the same bits again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..dispatch import load
from ..triton.waiting import wait_for_stream
from .cases import SelfTestCase, Shape
from .exact import ROUNDED, WIDE, Expected, difference, expected_drift, expected_pull
from .inputs import Sample, Source, collect, operands_of

# The scales of gradients are powers of two, so that exact numbers stay exact.
_SCALES = (2.0, -0.5, 1.0, -4.0)


@dataclass(frozen=True)
class Subject:
    """A backend on a device. With ``bitwise`` its results have the same bits wherever its operands lie."""

    backend: str
    device: torch.device
    bitwise: bool = True

    def project(
        self, samples: Sequence[Sample], blocks: Sequence[Tensor] | None = None, settle: bool = True
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the drifts and squares of samples, with ``blocks`` in place of their own where given.

        ``settle``: wait for them.
        """
        operands = operands_of(samples)
        if blocks is not None:
            operands = operands._replace(blocks=blocks)
        results = load(self.backend).project_drift(operands)
        if settle:
            self.settle()
        return results

    def pull(
        self,
        samples: Sequence[Sample],
        drifts: Sequence[Tensor],
        scales: Tensor,
        accumulate: bool,
        settle: bool = True,
    ) -> None:
        """Write the samples' gradients, or add to them. ``settle``: wait for them."""
        operands = operands_of(samples).for_pull_back()
        load(self.backend).pull_back_into(collect(samples, "grad"), operands, drifts, scales, accumulate)
        if settle:
            self.settle()

    def settle(self) -> None:
        """Wait for all that is queued. Results are read after this alone, because reading them would wait for ever.

        Raises:
            Stalled: it does not end.
        """
        if self.device.type == "cuda":
            wait_for_stream(self.device)


@dataclass
class Findings:
    """Results of the checks of a case. ``worst`` is the largest error, in the units of ``bound``."""

    worst: float = 0.0
    bound: float = 0.0
    repeats: int = 0
    failures: list[str] = field(default_factory=list)


def check_numbers(case: SelfTestCase, subject: Subject) -> Findings:
    """Run every check of numbers, on small weights of which several make a call."""
    findings = Findings()
    for check in (_check_random, _check_exact, _check_at_anchor, _check_nan):
        for failure in check(case, subject, findings):
            findings.failures.append(f"{case}: {failure}")
    return findings


def _make_scales(samples: Sequence[Sample], device: torch.device) -> Tensor:
    numbers = [_SCALES[i % len(_SCALES)] for i in range(len(samples))]
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def _drifts_of(samples: Sequence[Sample]) -> list[Tensor]:
    """Return C of each sample, (0, 0) for full anchors."""
    empty = torch.empty(0, 0, dtype=torch.float32)
    return [empty if sample.drift is None else sample.drift for sample in samples]


# -- random numbers against float64 ----------------------------------------------------------------------


def _check_random(case: SelfTestCase, subject: Subject, findings: Findings) -> Iterator[str]:
    """Compare one call on random numbers with float64."""
    source = Source(case, subject.device)
    samples = [source.random(shape) for shape in case.small_shapes()]
    if case.operation == "drift":
        _poison(samples, subject.device)
        drifts, squares = subject.project(samples)
        yield from _compare_drifts(case, samples, drifts, squares, findings)
        return
    scales = _make_scales(samples, subject.device)
    before = _prepare_gradients(case, samples)
    subject.pull(samples, _drifts_of(samples), scales, case.accumulate)
    yield from _compare_gradients(case, samples, before, scales.tolist(), findings)


def _compare_drifts(
    case: SelfTestCase, samples: Sequence[Sample], drifts: Sequence[Tensor], squares: Tensor, findings: Findings
) -> Iterator[str]:
    """Compare C with float64, and its square with C."""
    totals = squares.double()
    for i, (sample, drift) in enumerate(zip(samples, drifts, strict=True)):
        if case.form == "full":
            total = difference(sample).square().sum()
        else:
            total = drift.double().square().sum()
            yield from _check_close(
                case, f"C of weight {i}, {sample.shape}", drift, expected_drift(sample), 0.0, findings
            )
        error = float((totals[i] - total).abs())
        if not error <= 1e-5 * float(total):
            yield f"||C||^2 of weight {i}, {sample.shape}: got {float(totals[i]):.9g}, expected {float(total):.9g}"


def _compare_gradients(
    case: SelfTestCase, samples: Sequence[Sample], before: Sequence[Tensor], scales: Sequence[float], findings: Findings
) -> Iterator[str]:
    """Compare G with float64; ``before`` holds the numbers that are added to."""
    for i, sample in enumerate(samples):
        assert sample.grad is not None
        if case.form == "full":
            pulled = difference(sample) * scales[i]
            expected = Expected(pulled, pulled.abs())
        else:
            expected = expected_pull(sample, scales[i])
        values = expected.values + before[i].double() if case.accumulate else expected.values
        name = f"G of weight {i}, {sample.shape}"
        yield from _check_close(
            case, name, sample.grad, Expected(values, expected.size), torch.finfo(sample.grad.dtype).eps, findings
        )


def _check_close(
    case: SelfTestCase, name: str, actual: Tensor, expected: Expected, rounding: float, findings: Findings
) -> Iterator[str]:
    if not actual.numel():
        return
    bound = ROUNDED if case.may_round else WIDE
    # Beside that bound, a result may be rounded to its dtype, and be off by the smallest normal number.
    error = (actual.double() - expected.values).abs_()
    allowed = expected.size * bound + expected.values.abs() * rounding + torch.finfo(actual.dtype).tiny
    ratio = (error / allowed).nan_to_num_(nan=float("inf"), posinf=float("inf")).reshape(-1)
    worst, at = ratio.max(0)
    findings.worst, findings.bound = max(findings.worst, float(worst) * bound), bound
    if float(worst) > 1.0:
        row, col = divmod(int(at), actual.shape[1])
        wrong = int((ratio > 1.0).sum())
        got, exact = float(actual[row, col]), float(expected.values[row, col])
        yield (
            f"{name}: got {got:.6g} at ({row}, {col}), expected {exact:.6g} within {float(allowed[row, col]):.2g}; "
            f"{wrong} of {actual.numel()} numbers are wrong"
        )


def _prepare_gradients(case: SelfTestCase, samples: Sequence[Sample]) -> list[Tensor]:
    """Return copies of the gradients before the call; fill those that it will write over with NaN."""
    before = [sample.grad.clone() for sample in samples if sample.grad is not None]
    if not case.accumulate:
        for sample in samples:
            assert sample.grad is not None
            sample.grad.fill_(float("nan"))
    return before


def _poison(samples: Sequence[Sample], device: torch.device) -> None:
    """Fill memory that the allocator will most likely hand out for the drifts with NaN: a missing number shows."""
    for sample in samples:
        if sample.left is not None:
            k = sample.left.shape[1]
            torch.full((k, k), float("nan"), dtype=torch.float32, device=device)


# -- numbers that no order of summation changes -----------------------------------------------------------


def _check_exact(case: SelfTestCase, subject: Subject, findings: Findings) -> Iterator[str]:
    """Compare one call bit for bit, on numbers of which each result is one product."""
    source = Source(case, subject.device, "exact")
    samples = [source.exact(shape, i) for i, shape in enumerate(case.small_shapes())]
    if case.operation == "drift":
        _poison(samples, subject.device)
        drifts, _ = subject.project(samples)
        for i, (sample, drift) in enumerate(zip(samples, drifts, strict=True)):
            if case.form == "full":
                continue
            values = expected_drift(replace(sample, block=None)).values.float()
            if sample.block is not None:
                values = values - sample.block
            yield from _check_equal(f"C of weight {i}, {sample.shape}, one product each", drift, values)
        return
    # Scales on the CPU travel with the kernels' tables, another way than those on the device.
    scales = _make_scales(samples, torch.device("cpu"))
    before = _prepare_gradients(case, samples)
    subject.pull(samples, _drifts_of(samples), scales, case.accumulate)
    for i, sample in enumerate(samples):
        assert sample.grad is not None
        scale = float(scales[i])
        pulled = difference(sample) * scale if case.form == "full" else expected_pull(sample, scale).values
        total = pulled.float() + before[i].float() if case.accumulate else pulled.float()
        yield from _check_equal(
            f"G of weight {i}, {sample.shape}, one product each", sample.grad, total.to(sample.grad.dtype)
        )


def _check_equal(name: str, actual: Tensor, exact: Tensor) -> Iterator[str]:
    # This comparison takes minus zero for zero, and NaN for a difference.
    wrong = (actual != exact).reshape(-1)
    count = int(wrong.sum())
    if count:
        row, col = divmod(int(wrong.to(torch.uint8).argmax()), actual.shape[1])
        yield (
            f"{name}: got {float(actual[row, col]):.9g} at ({row}, {col}), expected exactly "
            f"{float(exact[row, col]):.9g}; {count} of {actual.numel()} numbers are wrong"
        )


# -- at the anchor, and not finite -------------------------------------------------------------------------


def _check_at_anchor(case: SelfTestCase, subject: Subject, findings: Findings) -> Iterator[str]:
    """Check that C of the base form, the norm of full anchors and every gradient are exactly zero at W0, and C of the
    block form with a block that the same arithmetic computed.
    """
    source = Source(case, subject.device, "still")
    samples = [source.random(shape, at_anchor=True) for shape in case.small_shapes()]
    if case.operation == "gradient":
        if case.form == "any":
            samples = [replace(p, drift=None if p.drift is None else torch.zeros_like(p.drift)) for p in samples]
        before = _prepare_gradients(case, samples)
        subject.pull(samples, _drifts_of(samples), _make_scales(samples, subject.device), case.accumulate)
        for i, sample in enumerate(samples):
            assert sample.grad is not None
            exact = before[i] if case.accumulate else torch.zeros_like(sample.grad)
            yield from _check_equal(f"G of weight {i}, {sample.shape}, without a drift", sample.grad, exact)
        return
    if case.form == "bare" or (case.form == "block" and not subject.bitwise):
        return
    blocks = subject.project(samples, [])[0] if case.form == "block" else []
    _poison(samples, subject.device)
    drifts, squares = subject.project(samples, blocks)
    for i, (sample, drift) in enumerate(zip(samples, drifts, strict=True)):
        yield from _check_equal(f"C of weight {i}, {sample.shape}, at W0", drift, torch.zeros_like(drift))
    if bool(squares.any()):
        yield f"||C||^2 at W0: got {squares.tolist()}, expected zeros"


def _check_nan(case: SelfTestCase, subject: Subject, findings: Findings) -> Iterator[str]:
    """Check that one NaN in the middle makes NaN of every number that depends on it."""
    source = Source(case, subject.device, "not finite")
    sample = source.random(case.small_shapes()[-1])
    matrix = sample.weight if sample.weight is not None else sample.drift
    assert matrix is not None
    row, col = matrix.shape[0] // 2, matrix.shape[1] - 1
    matrix[row, col].fill_(float("nan"))
    if case.operation == "drift":
        drifts, squares = subject.project([sample])
        if not bool(drifts[0].isnan().all()) or not bool(squares.isnan().all()):
            yield f"one NaN in W, {sample.shape}: got {float(squares[0])} for ||C||^2, expected NaN, and C all NaN"
        return
    _prepare_gradients(case, [sample])
    subject.pull([sample], _drifts_of([sample]), _make_scales([sample], subject.device), case.accumulate)
    assert sample.grad is not None
    dependent = sample.grad[row, col] if case.form == "full" else sample.grad
    if not bool(dependent.isnan().all()):
        yield f"one NaN in {'W' if case.form == 'full' else 'C'}, {sample.shape}: G shows numbers in its place"


# -- the same bits again -----------------------------------------------------------------------------------


def call_once(case: SelfTestCase, subject: Subject, shape: Shape, copies: int = 1) -> None:
    """Call the operation on one weight of a shape, or its projection on ``copies`` of it, for the launches it makes."""
    sample = Source(case, subject.device).random(shape, at_anchor=True)
    if case.operation == "drift":
        subject.project([sample] * copies)
    else:
        subject.pull([sample], _drifts_of([sample]), _make_scales([sample], subject.device), case.accumulate)


# Weights of a repeated call differ, so that a result left behind by one weight is wrong for the next.
_DISTINCT = 3


def check_repeats(case: SelfTestCase, subject: Subject, shape: Shape, copies: int, repeats: int) -> Findings:
    """Repeat a call of at least ``copies`` weights of one shape: each weight's result must have the same bits in every
    call and at every place of the list. The results of the first call are compared with float64.
    """
    findings = Findings(repeats=repeats)
    check = _repeat_drifts if case.operation == "drift" else _repeat_gradients
    for failure in check(case, subject, shape, -(-copies // _DISTINCT), repeats, findings):
        findings.failures.append(f"{case}: {failure}")
    return findings


def _settles(number: int) -> bool:
    """Return whether a repeated call is waited for: the first, whose results are read, and then every second.

    So launches of two calls follow each other closely, and yet few are queued behind one that does not end.
    """
    return number % 2 == 0


def _repeat_drifts(
    case: SelfTestCase, subject: Subject, shape: Shape, rounds: int, repeats: int, findings: Findings
) -> Iterator[str]:
    source = Source(case, subject.device, "repeated")
    distinct = [source.random(shape) for _ in range(_DISTINCT)]
    first: Tensor | None = None
    differing = torch.zeros((), dtype=torch.int64, device=subject.device)
    for number in range(repeats):
        shift = number % _DISTINCT
        drifts, squares = subject.project((distinct[shift:] + distinct[:shift]) * rounds, settle=_settles(number))
        results = torch.cat([torch.stack(list(drifts)).reshape(len(drifts), -1), squares[:, None]], 1)
        if first is None:
            first = results[:_DISTINCT].clone()
            yield from _compare_drifts(case, distinct, drifts[:_DISTINCT], squares[:_DISTINCT], findings)
        differing += (results.view(rounds, _DISTINCT, -1) != first.roll(-shift, 0)).any()
    subject.settle()
    yield from _report_differing(subject, shape, rounds, repeats, int(differing))


def _repeat_gradients(
    case: SelfTestCase, subject: Subject, shape: Shape, rounds: int, repeats: int, findings: Findings
) -> Iterator[str]:
    source = Source(case, subject.device, "repeated")
    distinct = [source.random(shape) for _ in range(_DISTINCT)]
    grads = collect(distinct, "grad")
    flipped = case.kind.endswith("transposed")
    before = torch.stack([grad.T if flipped else grad for grad in grads])
    memory = before.repeat(rounds, 1, 1)
    targets = [grad.T if flipped else grad for grad in memory]
    scales = torch.tensor(_SCALES[:_DISTINCT], dtype=torch.float32, device=subject.device)
    first: Tensor | None = None
    differing = torch.zeros((), dtype=torch.int64, device=subject.device)
    for number in range(repeats):
        shift = number % _DISTINCT
        if case.accumulate:
            memory.view(rounds, *before.shape).copy_(before.roll(-shift, 0))
        else:
            memory.fill_(float("nan"))
        samples = (distinct[shift:] + distinct[:shift]) * rounds
        samples = [replace(sample, grad=grad) for sample, grad in zip(samples, targets, strict=True)]
        turned = scales.roll(-shift, 0).repeat(rounds)
        subject.pull(samples, _drifts_of(samples), turned, case.accumulate, settle=_settles(number))
        if first is None:
            first = memory[:_DISTINCT].clone()
            yield from _compare_gradients(case, samples[:_DISTINCT], grads, list(_SCALES), findings)
        differing += (memory.view(rounds, *before.shape) != first.roll(-shift, 0)).any()
    subject.settle()
    yield from _report_differing(subject, shape, rounds, repeats, int(differing))


def _report_differing(subject: Subject, shape: Shape, rounds: int, repeats: int, differing: int) -> Iterator[str]:
    if differing and subject.bitwise:
        yield (
            f"{differing} of {repeats} calls gave other bits than the first with the same operands "
            f"({rounds * _DISTINCT} weights, {shape})"
        )
