"""R of adapted weights and its gradients, against autograd of the dense formula in float64."""

from __future__ import annotations

import pytest

import rpsft_kernels as rk
from adapted_models import CASES, anchors_of, dense_penalty, distance, gradients, layers, move, pretrained

# Rounding of sums of some hundred terms in float64.
TOLERANCE = 1e-12


@pytest.mark.parametrize("name", CASES)
def test_penalty_and_gradients(name: str) -> None:
    case = CASES[name]
    model = case.make()
    start = pretrained(model)
    anchors = anchors_of(model, case.at)
    assert set(anchors) == {weight for weight, _ in layers(model)}
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    assert rk.accumulate_rotation_grad_(model, anchors, 1.0).item() == 0.0
    model.zero_grad()

    move(model)
    wanted = dense_penalty(model, anchors, start)
    wanted.backward()
    dense = gradients(model)
    model.zero_grad()

    penalty = rk.rotation_penalty(model, anchors)
    assert abs(penalty.item() / wanted.item() - 1) <= TOLERANCE
    penalty.backward()
    assert distance(gradients(model), dense) <= TOLERANCE

    again = rk.accumulate_rotation_grad_(model, anchors, 0.5)
    assert again.item() == penalty.item()
    assert distance(gradients(model), {key: 1.5 * grad for key, grad in dense.items()}) <= TOLERANCE
    model.zero_grad()
    rk.accumulate_rotation_grad_(model, anchors, -3.0)
    assert distance(gradients(model), {key: -3 * grad for key, grad in dense.items()}) <= TOLERANCE
