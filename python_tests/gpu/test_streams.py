"""Steps on streams other than the one before: what they read is there when they read it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from filling import Case, Inputs, findings, make_inputs, step
from rpsft_kernels import ops

# 100 ms of a GPU at 2 GHz: far longer than the host needs to queue a step.
CYCLES = 200_000_000
CASE = Case("base", rank=72)


@pytest.fixture
def side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def fresh_inputs(
    shapes: tuple[tuple[int, int], ...], device: torch.device, side: torch.cuda.Stream
) -> tuple[Inputs, Inputs]:
    """Inputs that no step has seen, and others of their shapes that steps have: by now kernels are loaded and memory is
    at hand on both streams, none of which may wait for the long kernel in a test's stead.
    """
    seen, inputs = (make_inputs(CASE, shapes, device, seed=seed) for seed in (1, 2))
    torch.cuda.synchronize()
    for stream in (torch.cuda.current_stream(device), side):
        with torch.cuda.stream(stream):
            step(seen)
    torch.cuda.synchronize()
    return inputs, seen


def late(inputs: Inputs) -> Inputs:
    """The same inputs, whose values arrive on the current stream behind a long kernel; NaN until then."""
    lists = ("weights", "lefts", "rights", "bases", "blocks", "before")
    source = {name: [tensor.clone() for tensor in getattr(inputs, name)] for name in lists}
    for name in lists:
        for tensor in getattr(inputs, name):
            tensor.fill_(float("nan"))
    torch.cuda.synchronize()
    torch.cuda._sleep(CYCLES)
    for name, tensors in source.items():
        for tensor, values in zip(getattr(inputs, name), tensors, strict=True):
            tensor.copy_(values)
    return inputs


def test_a_step_waits_for_its_own_stream(device: torch.device, side: torch.cuda.Stream) -> None:
    inputs, _ = fresh_inputs(((1000, 504), (504, 1000)), device, side)
    with torch.cuda.stream(side):
        drifts, squares = step(late(inputs))
        waited = side.query()
    assert not waited, "the long kernel had ended before the step was queued: nothing was tested"
    side.synchronize()
    assert list(findings(CASE, inputs, drifts, squares)) == []


def test_what_one_stream_has_uploaded_another_waits_for(device: torch.device, side: torch.cuda.Stream) -> None:
    # Steps of larger weights have loaded the same kernels; the schedules of these have never been sent.
    fresh_inputs(((2016, 1024), (1024, 2016)), device, side)
    inputs = make_inputs(CASE, ((1008, 512), (512, 1008)), device)
    torch.cuda.synchronize()
    # The schedules of a first step are copied behind the long kernel; the second step, of the same shapes and thus the
    # same schedules, is queued on a stream where nothing is in its way.
    torch.cuda._sleep(CYCLES)
    first = step(inputs)
    with torch.cuda.stream(side):
        drifts, squares = forward(inputs)
    assert not torch.cuda.current_stream(device).query(), "the long kernel had ended: nothing was tested"
    torch.cuda.synchronize()
    assert all(torch.equal(one, other) for one, other in zip(first[0], drifts, strict=True))
    assert torch.equal(first[1], squares)
    assert list(findings(CASE, inputs, drifts, squares)) == []


def forward(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    return ops.project_drift(inputs.operands(), "triton")


def test_a_backward_pass_follows_its_forward_pass_to_its_stream(device: torch.device, side: torch.cuda.Stream) -> None:
    pretrained = torch.randn(640, 320, device=device)
    anchor = rk.Anchor.from_weight(pretrained, 24)
    weight = (pretrained + 0.01 * torch.randn_like(pretrained)).requires_grad_()
    expected = rk.rotation_penalty(weight, anchor)
    (grad,) = torch.autograd.grad(expected, weight)
    values = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        with torch.no_grad():
            weight.copy_(values)
        penalty = rk.rotation_penalty(weight, anchor)
    # Autograd runs it on the stream of the forward pass, and makes the caller's wait for it.
    (late_grad,) = torch.autograd.grad(penalty, weight)
    torch.cuda.synchronize()
    assert torch.equal(penalty.detach(), expected.detach()) and torch.equal(late_grad, grad)


def test_a_loop_whose_steps_alternate_between_streams(device: torch.device, side: torch.cuda.Stream) -> None:
    pretrained = [torch.randn(shape, device=device, dtype=torch.bfloat16) for shape in ((512, 264), (264, 512))]
    anchors = [rk.Anchor.from_weight(weight, 24) for weight in pretrained]

    def train(streams: list[torch.cuda.Stream]) -> list[Tensor]:
        weights = [(weight * 1.01).requires_grad_() for weight in pretrained]
        torch.cuda.synchronize()
        before: torch.cuda.Stream | None = None
        for turn in range(12):
            stream = streams[turn % len(streams)]
            if before is not None:
                stream.wait_stream(before)
            with torch.cuda.stream(stream), torch.no_grad():
                rk.accumulate_rotation_grad_(weights, anchors, 1e-3)
                for weight in weights:
                    assert weight.grad is not None
                    weight -= weight.grad
                    weight.grad = None if turn % 3 == 0 else weight.grad.zero_()
            before = stream
        torch.cuda.synchronize()
        return [weight.detach() for weight in weights]

    current = torch.cuda.current_stream(device)
    for one, other in zip(train([current]), train([current, side]), strict=True):
        assert torch.equal(one, other)
