"""The weights that the benchmarks time, and the float64 truth that they are checked against."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.suites.layer import RELATIVE_DRIFT, Layer

CPU = torch.device("cpu")
SHAPES = [(24, 40), (40, 24), (8, 40)]
RANK = 8


def _layer(dtype: torch.dtype = torch.float32) -> Layer:
    return Layer(SHAPES, RANK, dtype, 0, CPU)


def _exact(layer: Layer, index: int) -> torch.Tensor:
    """dR/dW in float64, by autograd."""
    weight = layer.weights[index].detach().double().requires_grad_()
    drift = weight - layer.pretrained[index].double()
    if not layer.is_full[index]:
        drift = layer.lefts[index].double().T @ drift @ layer.rights[index].double()
    (found,) = torch.autograd.grad(drift.square().sum(), weight)
    return found


@pytest.mark.parametrize("chunk", [1 << 24, 100, 1])
def test_errors_are_those_against_autograd_in_float64(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.suites.layer._CHUNK_ELEMENTS", chunk)
    layer = _layer()
    assert layer.is_full == [False, False, True]
    for i, off in enumerate((0.0, 0.25, -0.5)):
        layer.weights[i].grad = ((1 + off) * _exact(layer, i)).float()
    assert layer.gradient_errors() == pytest.approx([0.0, 0.25, 0.5], abs=1e-6)
    assert layer.worst_gradient_error() == pytest.approx(0.5, abs=1e-6)


def test_a_gradient_that_is_not_a_number_is_the_worst() -> None:
    layer = _layer()
    for i in range(3):
        layer.weights[i].grad = _exact(layer, i).float()
    layer.weights[0].grad[3, 3] = math.nan  # type: ignore[index]
    assert math.isnan(layer.worst_gradient_error())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_have_drifted_from_bfloat16_ones_by_the_stated_share(dtype: torch.dtype) -> None:
    layer = _layer(dtype)
    assert all(weight.dtype == dtype and weight.grad is not None for weight in layer.weights)
    for before, small in zip(layer.pretrained, layer.bf16_pretrained, strict=True):
        torch.testing.assert_close(small.to(dtype), before, rtol=0, atol=0)
    # Half of the energy lies in the bases, so that a drift of the other half's scale is less, relatively.
    assert 0.5 * RELATIVE_DRIFT[dtype] < layer.drift < 1.2 * RELATIVE_DRIFT[dtype]


def test_half_of_the_energy_lies_in_the_bases() -> None:
    layer = Layer([(256, 320)], 32, torch.float32, 0, CPU)
    before = layer.pretrained[0]
    seen = (layer.lefts[0].T @ before @ layer.rights[0]).square().sum() / before.square().sum()
    assert 0.4 < float(seen) < 0.6


def test_at_the_anchor_weights_are_pretrained_and_come_back() -> None:
    layer = _layer()
    moved = [weight.detach().clone() for weight in layer.weights]
    with layer.at_anchor():
        for weight, before in zip(layer.weights, layer.pretrained, strict=True):
            assert torch.equal(weight, before)
            assert weight.grad is not None
            weight.grad.fill_(1)
    for weight, after in zip(layer.weights, moved, strict=True):
        assert torch.equal(weight, after) and weight.grad is not None and not weight.grad.any()


def test_necessary_work_is_counted_by_hand() -> None:
    layer = _layer(torch.bfloat16)
    assert layer.elements == 2 * 24 * 40 + 8 * 40
    # The third anchor is full.
    assert layer.necessary_flops == 2 * (4 * 24 * 40 * 8 + 4 * 8 * 8 * 24)
    bases = 2 * 2 * (24 + 40) * 8
    assert layer.necessary_bytes(reads_base=True) == 4 * 2 * layer.elements + bases
    assert layer.necessary_bytes(reads_base=False) == 3 * 2 * layer.elements + 2 * 8 * 40 + bases
    # A float32 weight's base is in bfloat16.
    assert _layer(torch.float32).necessary_bytes(reads_base=True) == (3 * 4 + 2) * layer.elements + bases


def test_seeds_and_only_seeds_tell_layers_apart() -> None:
    first, second, other = (Layer(SHAPES, RANK, torch.float32, seed, CPU) for seed in (0, 0, 1))
    assert torch.equal(first.weights[0], second.weights[0]) and not torch.equal(first.weights[0], other.weights[0])
