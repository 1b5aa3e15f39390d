"""A weight that is not finite, in one process: it shows in R and in its own gradient, and nowhere else.

What is refused over several processes is tested with the ranks' agreement (``distributed/test_group_call.py``).
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from support import random_matrix

SICK = 1


def _weights() -> list[Tensor]:
    return [random_matrix(*shape, scale=0.2, seed=i) for i, shape in enumerate([(24, 40), (40, 24), (16, 16)])]


def _step(weights: list[Tensor], anchors: list[rk.Anchor], call: str) -> tuple[float, list[Tensor]]:
    """R, and the gradients."""
    leaves = [weight.clone().requires_grad_() for weight in weights]
    if call == "accumulate":
        for leaf in leaves:
            leaf.grad = torch.ones_like(leaf)
        penalty = rk.accumulate_rotation_grad_(leaves, anchors, 0.5)
    else:
        penalty = rk.rotation_penalty(leaves, anchors)
        penalty.backward()  # type: ignore[no-untyped-call]
    return penalty.item(), [leaf.grad for leaf in leaves if leaf.grad is not None]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["base", "block", "full"])
@pytest.mark.parametrize("call", ["accumulate", "differentiate"])
def test_it_shows_in_r_and_in_that_gradient_alone(call: str, form: str, value: float, backend: str) -> None:
    weights = _weights()
    anchors = [rk.Anchor.from_weight(w, 40 if form == "full" else 6, keep_base=form != "block") for w in weights]
    weights = [1.01 * weight for weight in weights]
    clean, expected = _step(weights, anchors, call)
    weights[SICK][3, 5] = value
    sick, found = _step(weights, anchors, call)
    assert math.isfinite(clean) and not math.isfinite(sick)
    for i, (gradient, other) in enumerate(zip(found, expected, strict=True)):
        if i == SICK:
            assert not gradient.isfinite().all()
            parameter = torch.nn.Parameter(weights[i])
            parameter.grad = gradient
            with pytest.raises(RuntimeError, match="non-finite"):
                torch.nn.utils.clip_grad_norm_([parameter], 1.0, error_if_nonfinite=True)
        else:
            assert torch.equal(gradient, other)
