"""The two requests of the public functions: R, and R with its gradients. Each checks what it needs of the weights."""

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
        """Raise a ValueError if a weight needs a gradient and autograd cannot reach it."""
        if not torch.is_grad_enabled():
            return
        for anchored in weights:
            if not anchored.weight.differentiable and anchored.weight.requires_grad:
                raise ValueError(
                    f"{anchored.name}: got a flat shard (FSDP1 or DeepSpeed ZeRO-3), which autograd cannot reach, "
                    "expected a call that needs no gradient: use accumulate_rotation_grad_ after backward, or "
                    "torch.no_grad() to evaluate R alone"
                )


@dataclass(frozen=True)
class AccumulationRequest:
    """R, and ``coeff * dR/dW`` added to the gradients.

    Attributes:
        coeff: as the user passed it.
        of_module: whether the weights are a module's; some of those may be frozen.
    """

    coeff: float
    of_module: bool

    def check(self, weights: Sequence[AnchoredWeight]) -> None:
        """Raise a ValueError unless coeff is a finite number and every gradient can be added to."""
        coeff = self.coeff
        if isinstance(coeff, bool) or not isinstance(coeff, (int, float)) or not abs(coeff) <= sys.float_info.max:
            raise ValueError(f"coeff: got {coeff!r}, expected a finite Python number (the paper's lambda)")
        for anchored in weights:
            parameter = anchored.weight.parameter
            if not self.of_module and not (parameter.requires_grad and parameter.is_leaf):
                raise ValueError(
                    f"{anchored.name}: got a tensor that is no leaf requiring grad, expected one that holds .grad; "
                    "call weight.requires_grad_(), or use rotation_penalty"
                )
            anchored.weight.check_gradient(anchored.name)
        if weights and not any(anchored.weight.requires_grad for anchored in weights):
            raise ValueError(
                "model: every anchored parameter is frozen, expected at least one that requires grad; "
                "use rotation_penalty to evaluate the penalty alone"
            )


Request = PenaltyRequest | AccumulationRequest
