"""The modes after the step: exact proximal steps of R, and projections onto a budget, of the weights themselves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

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


class Projected(NamedTuple):
    """R before a projection, on the device and as a number, and after it."""

    found: Tensor
    before: float
    after: float


def correct_(
    model: nn.Module, anchors: Mapping[str, Anchor], shares: float | Mapping[int, float]
) -> tuple[Tensor, Tensor]:
    """Take a share of the drift out of each weight that trains; returns R of before and of now. Nothing waits."""
    return _correct(model, anchors, CorrectionRequest(shares, key="a proximal step"))


def project_onto_(model: nn.Module, anchors: Mapping[str, Anchor], bound: float) -> Projected:
    """Scale the drifts of the weights that train down by one factor, so that R is ``bound``, if it is more.

    It waits for the device.
    """
    request = _Bound(bound)
    found, _ = _correct(model, anchors, CorrectionRequest(decide=request.decide, key=f"onto {bound!r}"))
    before = request.found
    if before > bound:
        # What is computed of the R that is left is near enough after one small correction, if its rounding is small.
        known = before <= _ONE_PASS * bound and not _has_coarse_weights(model)
        for _ in range(_MOST_PASSES if before > _ONE_PASS * bound else 0):
            again = CorrectionRequest(decide=request.decide_again, key=f"onto {bound!r} again")
            _correct(model, anchors, again)
            known = request.near
            if known:
                break
        if not known:
            _correct(model, anchors, CorrectionRequest(decide=request.measure, key="R after a projection"))
    return Projected(found, before, request.left)


def _has_coarse_weights(model: nn.Module) -> bool:
    return any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())


class _Bound:
    """Decides which share of their drift weights lose."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self.found = self.left = 0.0
        self.near = False

    def decide(self, penalty: Tensor, moving: Tensor) -> float:
        """Return the share beyond the bound. Weights that do not train keep their part of R."""
        self.found, own = self._read(penalty, moving)
        return self._share(self.found, own) if self.found > self._bound else 0.0

    def decide_again(self, penalty: Tensor, moving: Tensor) -> float:
        """Return what is still missing, or was too much (a share below 0)."""
        self.found, own = self._read(penalty, moving)
        lost = self.found - own >= self._bound and own <= _TOLERANCE / 2 * self.found
        self.near = abs(self.found / self._bound - 1.0) <= _TOLERANCE / 2 or lost or not own > 0.0
        return 0.0 if self.near else self._share(self.found, own)

    def measure(self, penalty: Tensor, moving: Tensor) -> float:
        """Take note of R, and change nothing."""
        self._read(penalty, moving)
        return 0.0

    def _read(self, penalty: Tensor, moving: Tensor) -> tuple[float, float]:
        found, own = float(penalty), float(moving)
        if not math.isfinite(found):
            raise ValueError(f"weights: got R = {found}, expected finite weights; none of them was changed")
        self.left = found
        return found, own

    def _share(self, found: float, own: float) -> float:
        still = max(found - own, 0.0)
        kept = math.sqrt(max(self._bound - still, 0.0) / own) if own > 0.0 else 1.0
        self.left = still + kept**2 * own
        return 1.0 - kept


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


def _correct(model: nn.Module, anchors: Mapping[str, Anchor], request: CorrectionRequest) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        call = open_call(model, anchors, request, CorrectionCall)
        if call is None:
            return torch.zeros(()), torch.zeros(())
        try:
            return call.correct_()
        finally:
            call.close()
