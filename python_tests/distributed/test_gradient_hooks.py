"""Gradients that optimizers take within the backward pass are not added to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.optim import _apply_optimizer_in_backward

import rpsft_kernels as rk
from rpsft_kernels.distributed.gradient_hooks import reason_consumed
from small_models import mean_square, refused, vectors

LR = 0.1
_named_by_the_module: dict[Tensor, torch.optim.Optimizer] = {}


def _subject() -> tuple[nn.Linear, rk.Anchors]:
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=False)
    anchors = rk.Anchors.from_model(layer, 3, progress=False, basis_dtype=torch.float32)
    with torch.no_grad():
        layer.weight.add_(0.1 * torch.randn(12, 8))
    return layer, anchors


def _closure(free: bool) -> Callable[[nn.Linear], None]:
    def register(layer: nn.Linear) -> None:
        optimizers = {p: torch.optim.SGD([p], LR) for p in layer.parameters()}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()
            if free:
                optimizers[parameter].zero_grad()

        layer.weight.register_post_accumulate_grad_hook(step)

    return register


def _step_of_the_module(parameter: Tensor) -> None:
    _named_by_the_module[parameter].step()


def _global(layer: nn.Linear) -> None:
    _named_by_the_module[layer.weight] = torch.optim.SGD([layer.weight], LR)
    layer.weight.register_post_accumulate_grad_hook(_step_of_the_module)


class _Offload:
    def __init__(self, layer: nn.Linear) -> None:
        self.optimizers = {p: torch.optim.SGD([p], LR) for p in layer.parameters()}
        layer.weight.register_post_accumulate_grad_hook(self.step)

    def step(self, parameter: Tensor) -> None:
        self.optimizers[parameter].step()


def _partial(layer: nn.Linear) -> None:
    def step(optimizer: torch.optim.Optimizer, parameter: Tensor) -> None:
        optimizer.step()

    layer.weight.register_post_accumulate_grad_hook(functools.partial(step, torch.optim.SGD([layer.weight], LR)))


def _by_hand(layer: nn.Linear) -> None:
    def step(parameter: Tensor) -> None:
        with torch.no_grad():
            parameter.sub_(LR * parameter.grad)  # type: ignore[operator]
        parameter.grad = None

    layer.weight.register_post_accumulate_grad_hook(step)


def _of_torch(layer: nn.Linear) -> None:
    _apply_optimizer_in_backward(torch.optim.SGD, layer.parameters(), {"lr": LR})


class _OfLomo(torch.optim.Optimizer):
    """Steps as LOMO does: a hook that gets one gradient takes all those that are complete, and frees them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.parameters(), {"lr": LR})
        self.layer = layer
        for parameter in layer.parameters():
            parameter.register_hook(self._make_hook())

    def _make_hook(self) -> Callable[[Tensor], Tensor]:
        def step(gradient: Tensor) -> Tensor:
            with torch.no_grad():
                for parameter in self.layer.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(LR * parameter.grad)
                        parameter.grad = None
            return gradient

        return step


class _Trainer:
    """Has an optimizer, which its hook does not use."""

    def __init__(self, layer: nn.Linear) -> None:
        self.looks, self.optimizer = 0, torch.optim.SGD([layer.weight], LR)
        layer.weight.register_post_accumulate_grad_hook(self.look)

    def look(self, parameter: Tensor) -> None:
        self.looks += 1


OPTIMIZERS: dict[str, Callable[[nn.Linear], Any]] = {
    "in a closure, freeing": _closure(True),
    "in a closure": _closure(False),
    "in a global": _global,
    "in an object": _Offload,
    "in a partial": _partial,
    "by hand, freeing": _by_hand,
    "of torch": _of_torch,
    "of LOMO": _OfLomo,
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_in_the_backward_pass_is_refused(kind: str, after: bool) -> None:
    layer, anchors = _subject()
    OPTIMIZERS[kind](layer)
    if after:
        mean_square(layer, vectors(8)).backward()
    gradient = None if layer.weight.grad is None else layer.weight.grad.clone()
    message = refused(lambda: rk.accumulate_rotation_grad_(layer, anchors, 0.5))
    assert message.startswith("weight: got ") and "put rotation_penalty into the loss" in message
    found = layer.weight.grad
    assert found is gradient is None or (found is not None and gradient is not None and torch.equal(found, gradient))


def test_a_penalty_in_the_loss_serves() -> None:
    layer, anchors = _subject()
    before, expected = layer.weight.detach().clone(), layer.weight.detach().clone().requires_grad_()
    rk.rotation_penalty([expected], [anchors["weight"]]).backward()
    _closure(True)(layer)
    (0 * mean_square(layer, vectors(8)) + 0.5 * rk.rotation_penalty(layer, anchors)).backward()
    assert expected.grad is not None
    torch.testing.assert_close(layer.weight.detach(), before - LR * 0.5 * expected.grad)


def test_hooks_that_leave_the_gradient_there_are_no_obstacle_after_the_backward_pass() -> None:
    layer, anchors = _subject()
    trainer = _Trainer(layer)
    message = refused(lambda: rk.accumulate_rotation_grad_(layer, anchors, 0.5))
    assert "got no gradient, and 1 hooks" in message and layer.weight.grad is None
    mean_square(layer, vectors(8)).backward()
    assert layer.weight.grad is not None and reason_consumed(layer.weight) is None
    rk.accumulate_rotation_grad_(layer, anchors, 0.5)
    assert trainer.looks == 1


def test_hooks_that_get_a_gradient_and_use_no_optimizer_are_no_obstacle() -> None:
    layer, anchors = _subject()
    seen: list[float] = []
    layer.weight.register_hook(lambda gradient: seen.append(float(gradient.norm())))
    rk.accumulate_rotation_grad_(layer, anchors, 0.5)
    mean_square(layer, vectors(8)).backward()
    rk.accumulate_rotation_grad_(layer, anchors, 0.5)
    assert len(seen) == 1


def test_hooks_of_torch_itself_are_no_obstacle() -> None:
    layer, _ = _subject()
    hook = functools.partial(torch.nn.init.zeros_)
    layer.weight.register_post_accumulate_grad_hook(hook)
    assert reason_consumed(layer.weight) is None
