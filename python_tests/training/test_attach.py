"""The hook after the optimizer's step: how often it acts, with which learning rates, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import rpsft_kernels as rk
from closed_forms import corrected
from small_models import linear_layers, mean_square, vectors
from support import relative_error

SIZES = (24, 40, 20)
COEFF, LR = 3.0, 0.05


def _layers() -> nn.Sequential:
    return linear_layers(SIZES).double()


def _penalty(**options: Any) -> rk.RotationPenalty:
    return rk.RotationPenalty(8, COEFF, mode="decoupled", basis_dtype=torch.float64, **options)


def _backward(model: nn.Module) -> None:
    mean_square(model, vectors(SIZES[0]).double()).backward()


class Sub(torch.optim.SGD):
    """An optimizer whose step calls the step of its base class, and goes on."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(0.9)
        return loss


class SubOfSub(Sub):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.SGD, Sub, SubOfSub])
def test_it_acts_once_when_the_step_has_ended(kind: type[torch.optim.SGD]) -> None:
    # Instances of the base classes make torch wrap their steps too: hooks run once for each of them.
    for base in (torch.optim.SGD, Sub):
        base([torch.zeros(1, requires_grad=True)], lr=0.1)
    model, alone = _layers(), _layers()
    penalty = _penalty()
    optimizer, other = kind(model.parameters(), lr=LR), kind(alone.parameters(), lr=LR)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    rk.attach(optimizer, penalty, model)
    _backward(model)
    _backward(alone)
    optimizer.step()
    other.step()
    assert len(calls) == {torch.optim.SGD: 1, Sub: 2, SubOfSub: 3}[kind]
    assert penalty.step == 1
    assert penalty.anchors is not None
    expected = corrected(alone, penalty.anchors, 2 * LR * COEFF / (1 + 2 * LR * COEFF))
    for name, exact in expected.items():
        start = alone.get_parameter(name).detach().double()
        assert relative_error(model.get_parameter(name).detach().double() - start, exact - start) < 1e-9, name


def test_a_step_that_raises_is_no_step_and_the_next_one_counts() -> None:
    model, penalty = _layers(), _penalty()
    optimizer = Sub(model.parameters(), lr=LR)
    rk.attach(optimizer, penalty, model)

    def fail() -> float:
        raise KeyError("out of data")

    with pytest.raises(KeyError):
        optimizer.step(fail)
    assert penalty.step == 0
    _backward(model)
    optimizer.step()
    assert penalty.step == 1


def test_groups_have_learning_rates_of_their_own() -> None:
    model, alone = _layers(), _layers()
    rates = {"0.weight": 0.05, "2.weight": 0.01}

    def make(of: nn.Module) -> torch.optim.SGD:
        groups = [{"params": of.get_submodule(name[0]).parameters(), "lr": rate} for name, rate in rates.items()]
        return torch.optim.SGD(groups)

    penalty, optimizer, other = _penalty(), make(model), make(alone)
    rk.attach(optimizer, penalty, model)
    for of, steps in ((model, optimizer), (alone, other)):
        _backward(of)
        steps.step()
    assert penalty.anchors is not None
    shares = {name: 2 * rate * COEFF / (1 + 2 * rate * COEFF) for name, rate in rates.items()}
    for name, exact in corrected(alone, penalty.anchors, shares).items():
        start = alone.get_parameter(name).detach().double()
        assert relative_error(model.get_parameter(name).detach().double() - start, exact - start) < 1e-9, name


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model, penalty = _layers(), _penalty()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    rk.attach(optimizer, penalty, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step, finite in enumerate((True, False, True)):
        loss = mean_square(model, vectors(SIZES[0]).double())
        scaler.scale(loss).backward()
        if not finite:
            model.get_parameter("0.weight").grad[0, 0] = float("inf")  # type: ignore[index]
        before = [parameter.detach().clone() for parameter in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved = not all(map(torch.equal, before, model.parameters()))
        assert moved == finite, step
    assert penalty.step == 2


def test_the_handle_ends_it() -> None:
    model, penalty = _layers(), _penalty()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    handle = rk.attach(optimizer, penalty, model)
    with pytest.raises(ValueError, match="penalty: got one that is attached to an optimizer"):
        rk.attach(optimizer, penalty, model)
    handle.remove()
    _backward(model)
    optimizer.step()
    assert penalty.step == 0
    rk.attach(optimizer, penalty, model)
    optimizer.step()
    assert penalty.step == 1


def test_the_model_is_anchored_before_the_first_step() -> None:
    model, penalty = _layers(), rk.RotationPenalty(8, budget=1e-4, mode="project")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rk.attach(optimizer, penalty, model)
    assert penalty.anchors is not None
    penalty.anchors.verify(model)
    _backward(model)
    optimizer.step()
    assert penalty.metrics()["rotation/budget_used"] == pytest.approx(1.0, rel=1e-3)


class _Wrapper:
    """As Accelerate keeps an optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_wrappers_are_seen_through() -> None:
    model, penalty = _layers(), _penalty()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    rk.attach(_Wrapper(_Wrapper(optimizer)), penalty, model)  # type: ignore[arg-type]
    _backward(model)
    optimizer.step()
    assert penalty.step == 1


def _part(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.get_submodule("0").parameters(), lr=LR)


def _all(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


@pytest.mark.parametrize(
    ("optimizer", "penalty", "message"),
    [
        (_part, _penalty, r"optimizer: got one without 1 of the anchored weights that train \(2.weight\)"),
        (_all, lambda: rk.RotationPenalty(8), "penalty: got mode 'gradient', expected 'decoupled' or 'project'"),
        (lambda model: object(), _penalty, "optimizer: got object, expected a torch.optim.Optimizer"),
        (_all, lambda: None, "penalty: got NoneType, expected a rk.RotationPenalty"),
    ],
)
def test_refusals(optimizer: Callable[[nn.Module], Any], penalty: Callable[[], Any], message: str) -> None:
    model = _layers()
    made = optimizer(model)
    with pytest.raises(ValueError, match=message):
        rk.attach(made, penalty(), model)
    if isinstance(made, torch.optim.Optimizer):
        assert not made._optimizer_step_post_hooks


def test_a_model_that_cannot_be_corrected_is_refused_before_its_first_step() -> None:
    model = _layers()
    model.get_parameter("0.weight").main_grad = torch.zeros(40, 24)  # type: ignore[attr-defined, assignment]
    with pytest.raises(ValueError, match="got a parameter with a main_grad"):
        rk.attach(_all(model), _penalty(), model)
