"""Gradients that a call can or cannot add to: their dtypes and their memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from gradient_ranks import replicated, sharded
from ranks import run_ranks
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


# -- memory ------------------------------------------------------------------------------------------------


def _lay(values: str) -> Tensor:
    """A gradient (24, 40) whose elements share memory, or do not."""
    memory = random_matrix(200, 40, torch.float32, seed=9).reshape(-1)
    return {
        "one number": memory[:1].reshape(1, 1).expand(24, 40),
        "one row": memory[:40].expand(24, 40),
        "one column": memory[:24, None].expand(24, 40),
        "windows": memory.as_strided((24, 40), (3, 1)),
        "crossed": memory.as_strided((24, 40), (3, 2)),
        "columns of a buffer": memory[: 24 * 80].view(24, 80)[:, 7:47],
        "steps": memory.as_strided((24, 40), (120, 2), 1),
        "transposed": memory[: 24 * 40].view(40, 24).T,
    }[values]


@pytest.mark.parametrize("layout", ["one number", "one row", "one column", "windows", "crossed"])
def test_a_gradient_that_overlaps_itself_gets_memory_of_its_own(backend: str, layout: str) -> None:
    weights, anchors = _anchored(2)
    given = [_lay(layout) for _ in weights]
    before = given[0].clone()
    expected = [before.clone() for _ in weights]
    for weight, grad in zip(weights, expected, strict=True):
        weight.grad = grad
    penalty = rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    for _ in range(2):
        for weight, grad in zip(weights, given, strict=True):
            weight.grad = grad
        assert rk.accumulate_rotation_grad_(weights, anchors, 0.5) == penalty
        for weight, grad, wanted in zip(weights, given, expected, strict=True):
            assert weight.grad is not None and weight.grad.is_contiguous() and torch.equal(weight.grad, wanted)
            assert torch.equal(grad, before)


def test_the_gradient_of_a_sum(backend: str) -> None:
    weights, anchors = _anchored(2)
    for weight in weights:
        (weight.grad,) = torch.autograd.grad(weight.sum(), weight)
        assert weight.grad.stride() == (0, 0)
    rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    for weight, anchor in zip(weights, anchors, strict=True):
        assert weight.grad is not None
        assert relative_error(weight.grad - 1, exact_gradient(weight.detach(), anchor, 1.0)) < 0.01


@pytest.mark.parametrize("layout", ["columns of a buffer", "steps", "transposed"])
def test_a_gradient_with_steps_keeps_its_memory(backend: str, layout: str) -> None:
    weights, anchors = _anchored(2)
    for weight in weights:
        grad = weight.grad = _lay(layout)
        before = grad.clone()
        rk.accumulate_rotation_grad_(weight, anchors[0], 0.5)
        assert weight.grad is grad
        assert relative_error(grad - before, exact_gradient(weight.detach(), anchors[0], 1.0)) < 0.01


def test_two_gradients_that_overlap_are_refused(backend: str) -> None:
    weights, anchors = _anchored(3)
    memory = torch.ones(60, 40)
    # torch.autograd.grad gives both weights of a sum one tensor.
    total = ((weights[0] + weights[2]) * torch.ones(24, 40)).sum()
    pairs = [torch.autograd.grad(total, [weights[0], weights[2]]), (memory[:24], memory[23:47])]
    for one, other in pairs:
        weights[0].grad, weights[1].grad, weights[2].grad = one, None, other
        message = (
            r"^weights\[2\]\.grad: got a gradient that shares memory with weights\[0\]\.grad, .* copy it: weights\[2\]"
        )
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                rk.accumulate_rotation_grad_(weights, anchors, 0.5)
            assert weights[0].grad is one and weights[1].grad is None and weights[2].grad is other
            assert one.eq(1).all() and other.eq(1).all()
        weights[2].grad = other.clone()
        rk.accumulate_rotation_grad_(weights, anchors, 0.5)
        memory.fill_(1)
        one.fill_(1)


def test_gradients_that_are_columns_of_one_buffer(backend: str) -> None:
    weights, anchors = _anchored(2)
    memory = torch.ones(24, 80)
    weights[0].grad, weights[1].grad = memory[:, :40], memory[:, 40:]
    rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    wanted = [exact_gradient(weight.detach(), anchor, 1.0) for weight, anchor in zip(weights, anchors, strict=True)]
    assert relative_error(memory - 1, torch.cat(wanted, 1)) < 0.01


def test_a_weight_listed_twice_whose_gradient_overlaps_itself(backend: str) -> None:
    (weight, *_), anchors = _anchored(3)
    grads = []
    for grad in (torch.ones(24, 40), torch.ones(1, 1).expand(24, 40)):
        weight.grad = grad
        rk.accumulate_rotation_grad_([weight, weight, weight], [anchors[0], anchors[0], anchors[1]], 0.5)
        grads.append(weight.grad)
    assert torch.equal(*grads)


def test_a_refusal_puts_the_gradient_back(backend: str) -> None:
    weights, anchors = _anchored(2)
    given = weights[0].grad = torch.ones(1, 1).expand(24, 40)
    weights[1].grad = torch.ones(24, 40)
    weights[1].grad.data = weights[1].grad.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"^weights\[1\]\.grad: got a gradient in float8"):
        rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    assert weights[0].grad is given


def test_gradients_of_shards_that_share_memory() -> None:
    # Sums near 1 are rounded by 2^-24, to 1e-5 of what is added.
    first, second = run_ranks(2, sharded)
    for found in (first, second):
        assert max(found["errors"]) < 1e-4 and found["unchanged"]
    assert "weights[1].grad: got a gradient that shares memory with weights[0].grad" in second["message"]
    assert "rank 1 refused this call" in first["message"]


def test_gradients_of_replicas_that_share_memory() -> None:
    for errors in run_ranks(2, replicated):
        assert max(errors) < 1e-4
