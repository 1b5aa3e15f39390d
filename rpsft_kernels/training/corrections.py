"""The modes after the step: exact proximal steps of R, and projections onto a budget, of the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..anchors.anchor import Anchor
from ..evaluation.call import Call, open_call
from ..evaluation.correction_call import CorrectionCall
from ..evaluation.requests import CorrectionRequest, PenaltyRequest

# A projection is repeated where the rounding of U and V to bfloat16 may leave R further than this from the budget.
_TOLERANCE = 1e-3
# Below this R, relative to the budget, one pass is near enough: what is left out of C then is a small part of it.
_ONE_PASS = 1.1
_MOST_PASSES = 5


def proximal_share(lr: float, coeff: float) -> float:
    """Return s of the exact proximal step ``W -= s U C V^T`` of ``coeff * R`` at a learning rate."""
    doubled = 2.0 * lr * coeff
    return doubled / (1.0 + doubled) if math.isfinite(doubled) else 1.0


def correct_(model: nn.Module, anchors: Mapping[str, Anchor], shares: float | Mapping[int, float]) -> Tensor:
    """Take a share of the drift out of each weight that trains, and return R of before; nothing waits for a device."""
    return _correct(model, anchors, CorrectionRequest(shares, key="a proximal step"))


def project_onto_(model: nn.Module, anchors: Mapping[str, Anchor], bound: float) -> tuple[Tensor, float, float]:
    """Scale all drifts down by one factor so that R is ``bound``, if it is more. It waits for the device.

    Returns:
        R of before, on the device and as a number; and R of now.
    """
    found: list[float] = []

    def decide(penalty: Tensor) -> float:
        found.append(float(penalty))
        return _share(found[-1], bound)

    first = _correct(model, anchors, CorrectionRequest(decide=decide, key=f"onto {bound!r}"))
    if not found[0] > bound:
        return first, found[0], found[0]
    remaining, worst = bound, found[0]

    def decide_again(penalty: Tensor) -> float:
        found.append(float(penalty))
        near = abs(found[-1] / bound - 1.0) <= _TOLERANCE / 2
        return 0.0 if near or not found[-1] > 0.0 else _share(found[-1], bound, both=True)

    while worst > _ONE_PASS * bound and len(found) < _MOST_PASSES:
        _correct(model, anchors, CorrectionRequest(decide=decide_again, key=f"onto {bound!r} again"))
        remaining = worst = found[-1]
        if abs(remaining / bound - 1.0) <= _TOLERANCE / 2:
            break
        remaining = bound
    return first, found[0], remaining


def penalty_by_weight(model: nn.Module, anchors: Mapping[str, Anchor]) -> tuple[list[str], Tensor]:
    """Return the weights' names, and R of each, on the first weight's device."""
    with torch.no_grad():
        call = open_call(model, anchors, PenaltyRequest(), Call)
        if call is None:
            return [], torch.zeros(0)
        try:
            return call.penalty_by_weight()
        finally:
            call.close()


def _share(penalty: float, bound: float, both: bool = False) -> float:
    """Return the share of the drift beyond the budget; with ``both`` a negative one where R is below it."""
    if not math.isfinite(penalty):
        raise ValueError(f"weights: got R = {penalty}, expected finite weights; none of them was changed")
    if penalty <= bound and not both:
        return 0.0
    return 1.0 - math.sqrt(bound / penalty)


def _correct(model: nn.Module, anchors: Mapping[str, Anchor], request: CorrectionRequest) -> Tensor:
    with torch.no_grad():
        call = open_call(model, anchors, request, CorrectionCall)
        if call is None:
            return torch.zeros(())
        try:
            return call.correct_()
        finally:
            call.close()
