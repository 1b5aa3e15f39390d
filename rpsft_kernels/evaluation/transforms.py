"""Tensors of torch.func's transforms are refused: no kernel reads them, and gradients added to them are lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..low_rank import Factor
from ..private_names import in_transform, is_batch, is_differentiated
from .pairing import AnchoredWeight


def check_transforms(weights: Sequence[AnchoredWeight | Factor]) -> None:
    """Raise a ValueError if a weight belongs to a transform."""
    # Whether one runs is asked once, so that a step does not look at each weight.
    if torch.compiler.is_compiling() or not in_transform():
        return
    for anchored in weights:
        check_transform(anchored.weight.parameter, anchored.name)


def check_transform(tensor: Tensor, name: str) -> None:
    """Raise a ValueError under ``name`` if the tensor belongs to a transform."""
    if torch.compiler.is_compiling() or not in_transform():
        return
    if is_differentiated(tensor):
        raise ValueError(
            f"{name}: got a tensor that torch.func.grad, or another transform of its kind, differentiates, expected a "
            "plain one: use backward() or torch.autograd.grad, and torch.autograd.functional for jacobians and hessians"
        )
    if is_batch(tensor):
        raise ValueError(
            f"{name}: got a batch of torch.func.vmap, expected one plain tensor: pass a list of weights with as many "
            "anchors"
        )
