"""Warnings of wrong uses, each seen to be given; and right uses, in none of which one is given."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpsft_kernels as rk
from small_models import linear_layers, mean_square, vectors

SIZES = (24, 40, 20)


def _layers() -> nn.Sequential:
    return linear_layers(SIZES)


def _backward(model: nn.Module, scale: float = 1.0) -> None:
    (scale * mean_square(model, vectors(SIZES[0]))).backward()


class Run:
    """A model in training."""

    def __init__(self, coeff: float = 0.1, set_to_none: bool = True, **options: Any) -> None:
        self.model = _layers()
        self.penalty = rk.RotationPenalty(8, coeff, **options)
        self.penalty.anchor(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-3)
        self.set_to_none = set_to_none

    def steps(self, count: int, calls: int = 1) -> None:
        for _ in range(count):
            for _ in range(calls):
                _backward(self.model)
                self.penalty.add_gradients_(self.model)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=self.set_to_none)


@pytest.fixture
def _warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_two_calls_for_one_step() -> None:
    run = Run()
    run.steps(1)
    with pytest.warns(UserWarning, match="add_gradients_: got a second call for the same gradients") as caught:
        run.steps(2, calls=2)
    # Once, and for the line of the user.
    assert len(caught) == 1 and caught[0].filename == __file__


def test_two_calls_in_the_first_steps() -> None:
    run = Run()
    with pytest.warns(UserWarning, match="got a second call for the same gradients"):
        run.steps(2, calls=4)


def test_two_calls_with_gradients_that_are_zeroed_in_place() -> None:
    run = Run(set_to_none=False)
    # GradScaler skips a step now and then; three in a row look like something else.
    with pytest.warns(UserWarning, match="got a second call for the same gradients"):
        run.steps(6, calls=2)


def test_a_second_optimizer() -> None:
    model = _layers()
    penalty = rk.RotationPenalty(8, 0.1).anchor(model)
    optimizers = [torch.optim.SGD(model.get_submodule(name).parameters(), 1e-3) for name in ("0", "2")]

    def train() -> None:
        for _ in range(3):
            _backward(model)
            for optimizer in optimizers:
                penalty.add_gradients_(model)
                optimizer.step()
            model.zero_grad()

    with pytest.warns(UserWarning, match="with several optimizers before one of them"):
        train()


@pytest.mark.usefixtures("_warnings_are_errors")
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("first", [True, False])
def test_right_uses_are_not_warned_of(first: bool, set_to_none: bool) -> None:
    run = Run()
    for step in range(30):
        if first:
            run.penalty.add_gradients_(run.model)
        for _ in range(3):
            _backward(run.model)
        if not first:
            run.penalty.add_gradients_(run.model)
        with torch.no_grad():
            assert run.penalty.anchors is not None
            rk.rotation_penalty(run.model, run.penalty.anchors)
        # A GradScaler skips the first steps, and now and then one.
        if step > 3 and step % 7:
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=set_to_none)


@pytest.mark.usefixtures("_warnings_are_errors")
@pytest.mark.parametrize("mode", ["decoupled", "project"])
def test_right_uses_after_the_step(mode: Any) -> None:
    model = _layers()
    strength: dict[str, Any] = {"coeff": 3.0} if mode == "decoupled" else {"budget": 1e-3}
    penalty = rk.RotationPenalty(8, mode=mode, **strength).anchor(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for _ in range(30):
        _backward(model)
        optimizer.step()
        optimizer.zero_grad()
        penalty.after_step_(model, lr=1e-3)


@pytest.mark.usefixtures("_warnings_are_errors")
def test_weights_that_no_optimizer_trains_may_keep_their_gradients() -> None:
    run = Run()
    run.optimizer = torch.optim.AdamW(run.model.get_submodule("2").parameters(), 1e-3)
    run.steps(10)


def test_a_correction_without_a_step() -> None:
    model = _layers()
    penalty = rk.RotationPenalty(8, 3.0, mode="decoupled").anchor(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for skipped in (False, False, True):
        _backward(model)
        if not skipped:
            optimizer.step()
            penalty.after_step_(model, lr=1e-3)
    with pytest.warns(UserWarning, match="after_step_: got a call although no weight was written since the last one"):
        penalty.after_step_(model, lr=1e-3)


def test_a_copy_is_trained_in_place_of_the_model() -> None:
    run = Run()
    other = _layers()
    optimizer = torch.optim.AdamW(other.parameters(), 1e-3)

    def train() -> None:
        for _ in range(30):
            _backward(other)
            run.penalty.add_gradients_(run.model)
            run.model.zero_grad()
            optimizer.step()

    with pytest.warns(UserWarning, match=r"model: got R = 0 in 26 steps in a row, and no weight was written"):
        train()


def test_weights_that_are_written_and_do_not_move() -> None:
    run = Run()
    run.optimizer = torch.optim.AdamW(run.model.parameters(), lr=1e-12, weight_decay=0.0)
    with pytest.warns(UserWarning, match=r"got R = 0 in 11 steps in a row, although weights were written"):
        run.steps(13)


def test_a_coefficient_that_leaves_nothing_of_the_task() -> None:
    run = Run(coeff=1e7)
    with pytest.warns(
        UserWarning, match=r"coeff: got 1e\+07, with which the penalty's gradient is [\d.e+]+ times the task's"
    ):
        run.steps(4)


def test_gradients_that_are_lost() -> None:
    """The penalty is added, and what it added is cleared before the optimizer reads it."""
    run = Run(coeff=300.0)

    def train() -> None:
        for _ in range(60):
            _backward(run.model)
            run.penalty.add_gradients_(run.model)
            run.optimizer.zero_grad()
            _backward(run.model)
            run.optimizer.step()
            run.optimizer.zero_grad()

    with pytest.warns(UserWarning, match=r"got an R that has risen in 20 steps in a row .* gradients are lost"):
        train()


def test_low_coverage() -> None:
    model = linear_layers((24, 400, 20))
    anchors = rk.Anchors.from_model(model, 8, progress=False)
    few = rk.Anchors({"2.weight": anchors["2.weight"]})
    with pytest.warns(UserWarning, match=r"anchors: got anchors of 45\.5% of the elements that train"):
        rk.RotationPenalty(anchors=few).anchor(model)


@pytest.mark.usefixtures("_warnings_are_errors")
@pytest.mark.parametrize("leave_out", [lambda m: None, lambda m: m.get_parameter("0.weight").requires_grad_(False)])
def test_what_was_left_out_on_purpose_is_no_low_coverage(leave_out: Callable[[nn.Module], object]) -> None:
    model = linear_layers((24, 400, 20))
    frozen = leave_out(model) is not None
    if frozen:
        anchors = rk.Anchors({"2.weight": rk.Anchors.from_model(model, 8, progress=False)["2.weight"]})
    else:
        anchors = rk.Anchors.from_model(model, 8, exclude="0.weight", progress=False)
    rk.RotationPenalty(anchors=anchors).anchor(model)


def test_another_model_than_the_last_step_s_is_refused() -> None:
    """Such as that of the next seed, whatever has become of the first one; a wrapper is no other model."""
    run = Run()
    run.steps(2)
    run.penalty.add_gradients_(nn.Sequential(run.model[0], *run.model[1:]))
    run.model.zero_grad()
    state = run.penalty.state_dict()
    run.model, other = _layers(), _layers()
    _backward(other)
    before = [None if p.grad is None else p.grad.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match="add_gradients_ got another model than at the last step.*for each model"):
        run.penalty.add_gradients_(other)
    assert run.penalty.state_dict() == state
    for parameter, grad in zip(other.parameters(), before, strict=True):
        assert grad is None or torch.equal(parameter.grad, grad)  # type: ignore[arg-type]
    run.penalty.load_state_dict(state)
    run.penalty.add_gradients_(other)


def test_a_budget_that_cannot_be_held_says_what_helps() -> None:
    run = Run(coeff=1.0, budget=1e-6)
    run.optimizer.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match="The budget cannot be held so: a larger one"):
        run.steps(60)
