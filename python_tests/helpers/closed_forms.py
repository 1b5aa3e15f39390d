"""The modes after the step by their definition, in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from support import Pieces


def _difference(weight: Tensor, anchor: Pieces) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return C (W - W0 of a full anchor), U and V."""
    weight = weight.detach().double()
    if anchor.left is None or anchor.right is None:
        assert anchor.base is not None
        return weight - anchor.base.to(weight), None, None
    left, right = anchor.left.double(), anchor.right.double()
    pretrained = anchor.block.double() if anchor.block is not None else None
    if pretrained is None:
        assert anchor.base is not None
        pretrained = left.T @ anchor.base.double() @ right
    return left.T @ weight @ right - pretrained, left, right


def exact_drifts(model: nn.Module, anchors: Mapping[str, Pieces]) -> dict[str, Tensor]:
    """Return C of each anchored weight, W - W0 where the anchor is full."""
    return {name: _difference(model.get_parameter(name), anchor)[0] for name, anchor in anchors.items()}


def exact_penalty_of(model: nn.Module, anchors: Mapping[str, Pieces]) -> float:
    return float(torch.stack([drift.square().sum() for drift in exact_drifts(model, anchors).values()]).sum())


def corrected(model: nn.Module, anchors: Mapping[str, Pieces], share: float | Mapping[str, float]) -> dict[str, Tensor]:
    """Return ``W - share U C V^T`` (full: ``W - share (W - W0)``) of each anchored weight."""
    found = {}
    for name, anchor in anchors.items():
        weight = model.get_parameter(name)
        drift, left, right = _difference(weight, anchor)
        taken = drift if left is None or right is None else left @ drift @ right.T
        found[name] = weight.detach().double() - (share if isinstance(share, float) else share[name]) * taken
    return found
