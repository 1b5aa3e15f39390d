"""Gradients that nobody would read are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rpsft_kernels as rk
from support import random_matrix

MARKS: dict[str, tuple[str, Any, str]] = {
    "Megatron": ("main_grad", torch.zeros(12, 8), "whose gradient is its main_grad"),
    "DeepSpeed, owned here": ("_hp_mapping", object(), "DeepSpeed"),
    "DeepSpeed, owned by another rank": ("_hp_mapping", None, "DeepSpeed"),
}


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("kind", MARKS)
def test_gradients_that_nobody_reads_are_refused(kind: str, as_module: bool) -> None:
    name, mark, expected = MARKS[kind]
    layer = torch.nn.Linear(8, 12, bias=False)
    anchor = rk.Anchor.from_weight(random_matrix(12, 8), 4)
    setattr(layer.weight, name, mark)
    weights: Any = layer if as_module else [layer.weight]
    anchors: Any = rk.Anchors({"weight": anchor}) if as_module else [anchor]
    with pytest.raises(ValueError, match=expected):
        rk.accumulate_rotation_grad_(weights, anchors, 0.1)
    assert layer.weight.grad is None and (mark is None or getattr(layer.weight, name) is mark)
    rk.rotation_penalty(weights, anchors)
    delattr(layer.weight, name)
    rk.accumulate_rotation_grad_(weights, anchors, 0.1)
    assert layer.weight.grad is not None
