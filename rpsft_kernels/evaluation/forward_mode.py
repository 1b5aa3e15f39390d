"""Tangents of forward-mode differentiation are refused: the operations would lose them, and the derivative be zero.

What other transforms of torch.func make of a tensor is refused with them (:mod:`.transforms`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..low_rank import Factor
from ..private_names import in_forward_mode
from .pairing import AnchoredWeight
from .transforms import check_transforms


def check_tangents(weights: Sequence[AnchoredWeight | Factor]) -> None:
    """Raise a ValueError if a weight has a tangent, or belongs to another transform."""
    # Whether any tensor may have one is asked once, so that a step does not look at each weight.
    if not torch.compiler.is_compiling() and in_forward_mode():
        for anchored in weights:
            check_tangent(anchored.weight.parameter, anchored.name)
    check_transforms(weights)


def check_tangent(tensor: Tensor, name: str) -> None:
    """Raise a ValueError under ``name`` if the tensor has a tangent."""
    if torch.compiler.is_compiling() or not in_forward_mode():
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call, unused-ignore]
        raise ValueError(
            f"{name}: got a tensor with a tangent of forward-mode differentiation, expected one without: only backward "
            "passes are implemented; torch.autograd.functional.jvp computes the same derivative from those"
        )
