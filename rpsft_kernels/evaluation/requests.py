"""The two things that can be asked of weights and anchors, and what each needs of the weights."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .pairing import AnchoredWeight


@dataclass(frozen=True)
class PenaltyRequest:
    """R, differentiable where gradients are on."""

    def check(self, weights: Sequence[AnchoredWeight]) -> None:
        """Raise a ValueError where autograd cannot reach a weight that it would have to."""
        if not torch.is_grad_enabled():
            return
        for one in weights:
            if not one.weight.differentiable and one.weight.requires_grad:
                raise ValueError(
                    f"{one.name}: got a flat shard (FSDP1 or DeepSpeed ZeRO-3), which autograd cannot reach, expected "
                    "a call that needs no gradient: use accumulate_rotation_grad_ after backward, or torch.no_grad() "
                    "to evaluate R alone"
                )


@dataclass(frozen=True)
class AccumulationRequest:
    """R, and ``coeff * dR/dW`` added to the gradients.

    Attributes:
        coeff: as the user gave it.
        of_module: whether the weights are a module's, some of which may be frozen.
    """

    coeff: float
    of_module: bool

    def check(self, weights: Sequence[AnchoredWeight]) -> None:
        """Raise a ValueError unless coeff is a finite number and every gradient can be added to now."""
        coeff = self.coeff
        if isinstance(coeff, bool) or not isinstance(coeff, (int, float)) or not abs(coeff) <= sys.float_info.max:
            raise ValueError(f"coeff: got {coeff!r}, expected a finite Python number (the paper's lambda)")
        for one in weights:
            parameter = one.weight.parameter
            if not self.of_module and not (parameter.requires_grad and parameter.is_leaf):
                raise ValueError(
                    f"{one.name}: got a tensor that is no leaf requiring grad, expected one that holds .grad; "
                    "call weight.requires_grad_(), or use rotation_penalty"
                )
            one.weight.check_gradient(one.name)
        if weights and not any(one.weight.requires_grad for one in weights):
            raise ValueError(
                "model: every anchored parameter is frozen, expected at least one that requires grad; "
                "use rotation_penalty to evaluate the penalty alone"
            )


Request = PenaltyRequest | AccumulationRequest
