"""What a call is asked for: R, R with its gradients, or R with the weights corrected. Each checks what it needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..checks import dtype_name, read_coeff
from ..low_rank import Factor
from .corrections import reason_unwritable
from .pairing import AnchoredWeight

# No number of ranks or loss scale is so large that the factor of a gradient with such a coeff overflows.
_SMALL = 1e18


@dataclass(frozen=True)
class PenaltyRequest:
    """R, differentiable where gradients are on."""

    def check(self, weights: Sequence[AnchoredWeight], factors: Sequence[Factor] = ()) -> None:
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
        coeff: as the user passed it, any number that ``float()`` takes.
        of_module: whether the weights are a module's; some of those may be frozen.
    """

    coeff: object
    of_module: bool

    @cached_property
    def factor(self) -> float:
        """``coeff`` as a Python number; a ValueError if it is none. Read once: a tensor on a GPU is waited for."""
        return read_coeff(self.coeff)

    def check(self, weights: Sequence[AnchoredWeight], factors: Sequence[Factor] = ()) -> None:
        """Raise a ValueError unless coeff is a number that gradients can be scaled by, and all can be added to."""
        if abs(self.factor) > _SMALL:
            self._check_scales([*weights, *factors])
        for anchored in weights:
            parameter = anchored.weight.parameter
            if not self.of_module and not (parameter.requires_grad and parameter.is_leaf):
                raise ValueError(
                    f"{anchored.name}: got a tensor that is no leaf requiring grad, expected one that holds .grad; "
                    "call weight.requires_grad_(), or use rotation_penalty"
                )
            anchored.weight.check_gradient(anchored.name)
        for factor in factors:
            factor.weight.check_gradient(factor.name)
        trained = [anchored.weight.requires_grad for anchored in weights]
        trained += [factor.weight.requires_grad for factor in factors]
        if trained and not any(trained):
            raise ValueError(
                "model: every anchored parameter is frozen, expected at least one that requires grad; "
                "use rotation_penalty to evaluate the penalty alone"
            )

    def _check_scales(self, weights: Sequence[AnchoredWeight | Factor]) -> None:
        """Raise a ValueError unless the dtype of every pull-back's sums holds the factor of the gradient."""
        for anchored in weights:
            scale, dtype = anchored.weight.grad_scale, ops.accumulation_dtype(anchored.weight.dtype)
            largest = torch.finfo(dtype).max
            bound = largest / 2 / scale
            if abs(self.factor) > bound:
                times = "" if scale == 1 else f" times {scale:g} (the number of ranks, or the loss scale)"
                raise ValueError(
                    f"coeff: got {self.factor!r}, expected at most {bound:.2g} in magnitude: {anchored.name}.grad is "
                    f"scaled by 2 coeff{times} in {dtype_name(dtype)}, which holds numbers up to {largest:.2g}"
                )


@dataclass(frozen=True)
class CorrectionRequest:
    """R, and a share of every drift taken out of the weights that train: ``W -= share U C V^T``.

    Attributes:
        shares: one for all weights, or one for each by the ``id`` of its parameter.
        decide: returns the share of all weights that train for the R that was found and the part of it that is
            theirs, 0 to leave them as they are; None takes ``shares``. It may wait for the device.
        key: everything else that ranks must agree on, as text.
    """

    shares: float | Mapping[int, float] = 0.0
    decide: Callable[[Tensor, Tensor], float] | None = None
    key: str = ""

    def check(self, weights: Sequence[AnchoredWeight], factors: Sequence[Factor] = ()) -> None:
        """Raise a ValueError unless all weights that train can be written where they lie."""
        if factors:
            raise ValueError(
                f"{factors[0].name}: got an adapter's factor, expected weights that train themselves: the modes after "
                "the step correct the weights where they lie, and a correction has more directions than an adapter: "
                "use mode 'gradient'"
            )
        seen: set[int] = set()
        for anchored in weights:
            weight = anchored.weight
            if not weight.requires_grad:
                continue
            reason = reason_unwritable(anchored)
            if reason is not None:
                raise ValueError(f"{anchored.name}: {reason}")
            if weight.identity in seen:
                raise ValueError(
                    f"{anchored.name}: got a weight that has another anchor too, expected one for each parameter: it "
                    "would be corrected twice"
                )
            seen.add(weight.identity)
        if weights and not seen:
            raise ValueError(
                "model: every anchored parameter is frozen, expected at least one that trains: the modes after the "
                "step correct the weights themselves. Adapters train in their place? Use mode 'gradient'"
            )


Request = PenaltyRequest | AccumulationRequest | CorrectionRequest
