"""Gradients that a call can or cannot add to: their dtypes and their memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from support import exact_gradient, random_matrix, relative_error


def _anchored(count: int) -> tuple[list[Tensor], list[rk.Anchor]]:
    """Weights of 24 x 40 at some distance from their anchors; every second anchor is a full one."""
    weights, anchors = [], []
    for i in range(count):
        pretrained = random_matrix(24, 40, torch.float32, seed=2 * i)
        step = 0.1 * random_matrix(24, 40, torch.float32, seed=2 * i + 1)
        weights.append((pretrained + step).requires_grad_())
        anchors.append(rk.Anchor.from_weight(pretrained, 24 if i % 2 else 4))
    return weights, anchors


# -- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_later_gradient_of_a_wrong_dtype_is_refused_before_any_changes(backend: str, dtype: torch.dtype) -> None:
    weights, anchors = _anchored(3)
    for weight in weights:
        weight.grad = torch.ones(24, 40)
    assert weights[1].grad is not None
    # torch lets a gradient have another dtype than its weight in this way alone, where it knows no grad_dtype.
    weights[1].grad.data = torch.ones(24, 40).to(dtype)
    if backend == "torch" and dtype == torch.float64:
        rk.accumulate_rotation_grad_(weights, anchors, 0.5)
        assert relative_error(weights[1].grad - 1, exact_gradient(weights[1].detach(), anchors[1], 1.0)) < 2e-6
        return
    way_out = r"cast it: weights\[1\]\.grad = weights\[1\]\.grad\.to\(torch\.float32\)"
    if dtype == torch.float64:
        way_out += r", or use_backend\('torch'\)$"
    with pytest.raises(
        ValueError, match=rf"^weights\[1\]\.grad: got a gradient in {str(dtype)[6:]}, expected .*; {way_out}"
    ):
        rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    for weight in weights:
        assert weight.grad is not None and weight.grad.float().eq(1).all()
