from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from memory_trace import Trace, trace
from rpsft_kernels import ops
from rpsft_kernels.ops import reference
from support import random_matrix

SHAPE, RANK = (192, 256), 8
MEMBERS = 24


def _nbytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    return shape[0] * shape[1] * dtype.itemsize


def _anchored(form: str, dtype: torch.dtype, device: torch.device | str) -> tuple[list[Tensor], list[rk.Anchor]]:
    """Two weights, one of each orientation, moved from their anchors."""
    weights, anchors = [], []
    for seed, shape in enumerate((SHAPE, SHAPE[::-1])):
        pretrained = random_matrix(*shape, dtype, scale=0.2, seed=seed, device=device)
        rank = min(shape) if form == "full" else RANK
        anchors.append(rk.Anchor.from_weight(pretrained, rank, keep_base=form != "block"))
        weights.append((pretrained * 1.01).requires_grad_())
    return weights, anchors


def _give_gradients(weights: Sequence[Tensor]) -> None:
    for weight in weights:
        weight.grad = torch.zeros_like(weight)


def test_the_trace_sees_what_is_allocated() -> None:
    size = 4 * 1000

    def inside() -> Tensor:
        kept = torch.empty(1000)
        # An operator's own temporary: the sum of a strided float16 product in float32.
        return kept + (torch.ones(1000) * 2).sum()

    assert trace(lambda: None) == Trace(0, 0, 0)
    found = trace(lambda: inside() + 1)
    assert found.largest == size and 2 * size <= found.peak <= 3 * size + 64 and found.kept == 0


# -- accumulate_rotation_grad_ -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ["base", "block", "full"])
def test_accumulation_allocates_nothing_as_large_as_a_weight(form: str, dtype: torch.dtype) -> None:
    with rk.use_backend("torch"):
        weights, anchors = _anchored(form, dtype, "cpu")
        _give_gradients(weights)
        found = trace(lambda: rk.accumulate_rotation_grad_(weights, anchors, 1.0))
        # The gradients of a backward pass, for comparison: as large as the weights, and seen.
        for weight in weights:
            weight.grad = None
        by_autograd = trace(rk.rotation_penalty(weights, anchors).backward)
    one = _nbytes(SHAPE, dtype)
    assert 0 < found.largest < one and found.peak < _nbytes(SHAPE, torch.float32) and found.kept == 0
    assert by_autograd.largest >= one and by_autograd.kept >= 2 * one


@pytest.mark.parametrize(
    ("form", "dtype"), [("base", torch.float32), ("block", torch.bfloat16), ("full", torch.bfloat16)]
)
def test_the_kernels_accumulate_without_a_temporary_too(form: str, dtype: torch.dtype, device: torch.device) -> None:
    with rk.use_backend("triton"):
        weights, anchors = _anchored(form, dtype, device)
        _give_gradients(weights)
        found, again = (trace(lambda: rk.accumulate_rotation_grad_(weights, anchors, 1.0)) for _ in range(2))
    one = _nbytes(SHAPE, dtype)
    # Kept are tables of pointers and the scratch memory, which the next step uses again.
    assert 0 < found.largest < one and found.peak < 1.1 * one and found.kept < found.largest + one // 8
    assert again.largest < one // 8 and again.kept == 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_accumulation_allocates_the_gradients_that_did_not_exist(backend: str, device: torch.device) -> None:
    with rk.use_backend(backend):
        weights, anchors = _anchored("base", torch.float32, device)
        found = trace(lambda: rk.accumulate_rotation_grad_(weights, anchors, 1.0))
    one = _nbytes(SHAPE, torch.float32)
    # On a GPU plain PyTorch works on a small weight as a whole.
    temporaries = 2 if backend == "torch" and device.type == "cuda" else 1
    assert found.largest == one and found.kept / one == pytest.approx(2, abs=0.1)
    assert found.peak < (2 + temporaries) * one


def test_an_accumulation_by_way_of_the_whole_gradient_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def naive(
        grads: list[Tensor], operands: ops.Operands, drifts: list[Tensor], scales: Tensor, accumulate: bool
    ) -> None:
        whole = [torch.empty_like(grad) for grad in grads]
        reference.pull_back_into(whole, operands, drifts, scales, accumulate=False)
        for grad, addend in zip(grads, whole, strict=True):
            grad.add_(addend)

    class Naive:
        project_drift = staticmethod(reference.project_drift)
        pull_back_into = staticmethod(naive)

    monkeypatch.setattr("rpsft_kernels.ops.torch_ops.load", lambda name: Naive)
    weights, anchors = _anchored("base", torch.float32, "cpu")
    _give_gradients(weights)
    found = trace(lambda: rk.accumulate_rotation_grad_(weights, anchors, 1.0))
    assert found.largest == _nbytes(SHAPE, torch.float32)


def test_the_projection_allocates_nothing_as_large_as_a_weight() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for layout in (SHAPE, SHAPE[::-1]):
            weight = random_matrix(*layout, dtype)
            left, right = (torch.ones(size, RANK, dtype=torch.bfloat16) for size in layout)
            for bases in ([], [weight.float()], [weight.bfloat16()]):
                found = trace(
                    lambda w=weight, u=left, v=right, b=bases: ops.project_drift(
                        ops.Operands([w], [u], [v], b), "torch"
                    )
                )
                assert found.largest < _nbytes(SHAPE, dtype) and found.peak < _nbytes(SHAPE, torch.float32)


# -- the backward pass of rotation_penalty --------------------------------------------------------------------


def _model(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, rk.Anchors, int]:
    """Equal weights, anchored and moved; and the bytes of one gradient."""
    model = nn.Sequential(*(nn.Linear(48, 48, bias=False, dtype=dtype) for _ in range(MEMBERS)))
    anchors = rk.Anchors.from_model(model, 3, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model, anchors, 48 * 48 * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_backward_holds_one_bucket_of_gradients(dtype: torch.dtype) -> None:
    model, anchors, one = _model(dtype)
    _give_gradients(list(model.parameters()))
    penalty = rk.rotation_penalty(model, anchors)
    found = trace(penalty.backward)
    bucket = ops.limits_of(["cpu"], summed=False).weights
    assert bucket * one <= found.peak < (bucket + 1) * one and MEMBERS >= 3 * bucket
    assert found.kept == 0
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in model.parameters())


def test_backward_on_the_cpu_holds_large_gradients_one_by_one() -> None:
    shape, dtype = (3000, 4000), torch.bfloat16
    base, left, right = (random_matrix(*size, dtype) for size in (shape, (shape[0], 1), (shape[1], 1)))
    anchor = rk.Anchor(left=left, right=right, base=base, shape=shape, weight_dtype=dtype, rank=1, energy=1.0)
    weights = [(base * (1 + step)).requires_grad_() for step in (0.01, 0.02, 0.03)]
    _give_gradients(weights)
    found = trace(rk.rotation_penalty(weights, [anchor] * len(weights)).backward)
    one = _nbytes(shape, dtype)
    assert one <= found.peak < 1.5 * one and found.kept == 0


def test_more_than_one_bucket_at_once_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = ops.BucketLimits(weights=MEMBERS)
    plan = ops.plan_buckets
    monkeypatch.setattr(ops, "plan_buckets", lambda specs, _: plan(specs, limits))
    model, anchors, one = _model()
    _give_gradients(list(model.parameters()))
    assert trace(rk.rotation_penalty(model, anchors).backward).peak >= MEMBERS * one


def test_backward_into_no_gradients_holds_one_bucket_beyond_them() -> None:
    model, anchors, one = _model()
    found = trace(rk.rotation_penalty(model, anchors).backward)
    assert found.kept == MEMBERS * one and found.peak < (MEMBERS + 1) * one


def test_one_backward_with_the_task_loss_into_no_gradients() -> None:
    # Autograd adds the two before it makes a .grad of them: nothing as large as the model beside the gradients.
    model, anchors, one = _model()
    loss = model(torch.ones(1, 48)).sum() + rk.rotation_penalty(model, anchors)
    found = trace(loss.backward)
    assert found.peak < (MEMBERS + ops.BucketLimits().weights) * one


@pytest.mark.parametrize("first", ["task", "penalty"])
def test_backward_after_or_before_that_of_the_task_loss(first: str) -> None:
    # Micro-batches: gradients exist. Apart from each other, each pass adds its own a bucket or a layer at a time.
    model, anchors, one = _model()
    _give_gradients(list(model.parameters()))
    task, penalty = model(torch.ones(1, 48)).sum(), rk.rotation_penalty(model, anchors)
    passes = [task.backward, penalty.backward]
    for backward in passes if first == "task" else reversed(passes):
        assert trace(backward).peak < (ops.BucketLimits().weights + 1) * one


def test_the_graph_keeps_nothing_as_large_as_a_weight() -> None:
    weights, anchors = _anchored("base", torch.float32, "cpu")
    held: list[Tensor] = []
    found = trace(lambda: held.append(rk.rotation_penalty(weights, anchors)))
    assert held[0].requires_grad and 0 < found.kept < _nbytes(SHAPE, torch.float32) // 4
