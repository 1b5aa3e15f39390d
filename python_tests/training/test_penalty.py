"""RotationPenalty in mode gradient: what reaches the gradients, what it reports, and how a run is resumed."""

from __future__ import annotations

import copy
import json
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from closed_forms import corrected, exact_penalty_of
from rpsft_kernels.training.reading import Reading
from small_models import linear_layers, mean_square, vectors
from support import relative_error

SIZES = (24, 40, 20)
RANK = 8


def _layers() -> nn.Sequential:
    return linear_layers(SIZES)


def _drift(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def _backward(model: nn.Module, scale: float = 1.0) -> None:
    (scale * mean_square(model, vectors(SIZES[0]))).backward()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().double().clone() for name, p in model.named_parameters() if p.grad is not None}


def _moved(**options: Any) -> tuple[nn.Module, rk.RotationPenalty]:
    model = _layers()
    penalty = rk.RotationPenalty(RANK, basis_dtype=torch.float32, **options).anchor(model)
    _drift(model)
    return model, penalty


def _expected(model: nn.Module, penalty: rk.RotationPenalty, coeff: float) -> dict[str, Tensor]:
    """Return ``coeff * dR/dW = 2 coeff U C V^T``."""
    assert penalty.anchors is not None
    taken = corrected(model, penalty.anchors, 2.0 * coeff)
    return {name: model.get_parameter(name).detach().double() - weight for name, weight in taken.items()}


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("first", [True, False])
def test_gradients_are_those_of_the_task_and_of_r(first: bool, scale: float) -> None:
    model, penalty = _moved(coeff=3.0)
    _backward(model, scale)
    task = _gradients(model)
    model.zero_grad()
    if not first:
        _backward(model, scale)
    value = penalty.add_gradients_(model, scale=scale)
    if first:
        _backward(model, scale)
    for name, exact in _expected(model, penalty, 3.0).items():
        added = _gradients(model)[name] / scale - task[name] / scale
        assert relative_error(added, exact) < 1e-4, name
    assert penalty.anchors is not None
    assert float(value) == pytest.approx(exact_penalty_of(model, penalty.anchors), rel=1e-5)
    assert penalty.step == 1


def test_loss_term_is_the_step_s_call() -> None:
    model, penalty = _moved(coeff=lambda step: 3.0 + step)
    penalty.loss_term(model).backward()
    for name, exact in _expected(model, penalty, 3.0).items():
        assert relative_error(_gradients(model)[name], exact) < 1e-4, name
    term = penalty.loss_term(model)
    assert penalty.anchors is not None
    assert float(term) == pytest.approx(4.0 * exact_penalty_of(model, penalty.anchors), rel=1e-5)
    assert penalty.metrics()["rotation/loss"] == pytest.approx(float(term), rel=1e-6)


def test_schedules_and_warmup() -> None:
    model, penalty = _moved(coeff=lambda step: torch.tensor(10.0 - step), warmup=4)
    seen = []
    for _ in range(6):
        penalty.add_gradients_(model)
        seen.append(penalty.metrics()["rotation/coeff"])
        model.zero_grad()
    assert seen == [0.0, 9.0 * 0.25, 8.0 * 0.5, 7.0 * 0.75, 6.0, 5.0]


def test_metrics() -> None:
    model, penalty = _moved(coeff=3.0, per_layer=True)
    assert penalty.metrics() == {}
    _backward(model)
    norm = math.sqrt(sum(float(g.square().sum()) for n, g in _gradients(model).items() if n.endswith("weight")))
    penalty.add_gradients_(model)
    assert penalty.anchors is not None
    exact = exact_penalty_of(model, penalty.anchors)
    energy = sum(
        float((a.left.double().T @ _layers().get_parameter(name).detach().double() @ a.right.double()).square().sum())
        for name, a in penalty.anchors.items()
        if a.left is not None and a.right is not None
    )
    metrics = penalty.metrics()
    assert metrics["rotation/R"] == pytest.approx(exact, rel=1e-5)
    assert metrics["rotation/coeff"] == 3.0
    assert metrics["rotation/loss"] == pytest.approx(3 * exact, rel=1e-5)
    assert metrics["rotation/relative"] == pytest.approx(math.sqrt(exact / energy), rel=1e-5)
    assert metrics["rotation/grad_ratio"] == pytest.approx(6 * math.sqrt(exact) / norm, rel=1e-5)
    assert sum(metrics[f"rotation/layers/{name}"] for name in penalty.anchors) == pytest.approx(exact, rel=1e-5)
    assert "rotation/budget_used" not in metrics


def test_gradients_of_float64_weights_are_measured() -> None:
    model = _layers().double()
    penalty = rk.RotationPenalty(RANK, basis_dtype=torch.float64).anchor(model)
    _drift(model)
    model(vectors(SIZES[0]).double()).square().mean().backward()
    norm = math.sqrt(sum(float(g.square().sum()) for n, g in _gradients(model).items() if n.endswith("weight")))
    penalty.add_gradients_(model)
    metrics = penalty.metrics()
    assert metrics["rotation/grad_ratio"] == pytest.approx(2 * math.sqrt(metrics["rotation/R"]) / norm, rel=1e-6)


@pytest.mark.parametrize("before", [True, False])
def test_gradients_that_are_observed_apart(before: bool) -> None:
    model, penalty = _moved(coeff=3.0)
    norms = []
    for _ in range(3):
        if before:
            _backward(model)
            norm = math.sqrt(sum(float(g.square().sum()) for n, g in _gradients(model).items() if n.endswith("weight")))
            penalty.observe_gradients(model)
            penalty.add_gradients_(model)
        else:
            penalty.add_gradients_(model)
            _backward(model)
            norm = math.sqrt(sum(float(g.square().sum()) for n, g in _gradients(model).items() if n.endswith("weight")))
            penalty.observe_gradients(model)
        norms.append(norm)
        metrics = penalty.metrics()
        assert metrics["rotation/grad_ratio"] == pytest.approx(6 * math.sqrt(metrics["rotation/R"]) / norm, rel=1e-5)
        model.zero_grad()
        _drift(model)
    assert len(set(norms)) == 3


def test_steps_that_do_not_log_read_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, penalty = _moved(coeff=3.0, log_every=3)
    reads: list[int] = []
    read = Reading.read
    monkeypatch.setattr(Reading, "arrived", property(lambda self: False))
    monkeypatch.setattr(Reading, "read", lambda self: reads.append(1) or read(self))
    for step in range(7):
        _backward(model)
        penalty.add_gradients_(model)
        model.zero_grad()
        _drift(model)
        if step == 4:
            logged = penalty.metrics()
            reads.clear()
    assert reads == []
    assert penalty.metrics()["rotation/R"] != logged["rotation/R"]


# -- a budget ---------------------------------------------------------------------------------------------------


def test_a_model_s_name_is_no_model() -> None:
    with pytest.raises(ValueError, match="model: got str, expected a torch.nn.Module"):
        rk.RotationPenalty(8).anchor("gpt2")  # type: ignore[arg-type]


def test_a_budget_without_a_gradient_of_the_task_is_refused_in_the_third_step() -> None:
    model, penalty = _moved(budget=0.01)
    for _ in range(2):
        penalty.add_gradients_(model)
        model.zero_grad()
    with pytest.raises(ValueError, match="budget: got no gradient of the task in 2 steps"):
        penalty.add_gradients_(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert penalty.needs_task_gradient and penalty.budget == 0.01 and penalty.step == 2


def test_a_budget_waits_while_a_scaler_finds_its_scale() -> None:
    model, penalty = _moved(budget=0.01)
    for scale in (math.inf, math.inf, math.nan, math.inf):
        _backward(model, scale)
        penalty.add_gradients_(model)
        assert penalty.metrics()["rotation/coeff"] == 0.0
        model.zero_grad()
    _backward(model)
    penalty.add_gradients_(model)
    penalty.add_gradients_(model)
    assert penalty.metrics()["rotation/coeff"] > 0


@pytest.mark.parametrize("zeroed", [False, True])
def test_a_state_of_before_a_budget_began_is_gone_on_with(zeroed: bool) -> None:
    model, penalty = _moved(coeff=1.0)
    for _ in range(5):
        penalty.add_gradients_(model)
    resumed = rk.RotationPenalty(budget=0.01, anchors=penalty.anchors)
    resumed.load_state_dict(penalty.state_dict())
    model.zero_grad()
    if not zeroed:
        _backward(model)
        resumed.add_gradients_(model)
        resumed.add_gradients_(model)
        assert resumed.metrics()["rotation/coeff"] > 0
        return
    # Gradients of 0 are those of a call before the backward pass.
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    resumed.add_gradients_(model)
    resumed.add_gradients_(model)
    with pytest.raises(ValueError, match="budget: got no gradient of the task in 2 steps"):
        resumed.add_gradients_(model)


def test_a_budget_begins_with_the_size_of_the_task_s_gradient() -> None:
    model, penalty = _moved(budget=0.01)
    _backward(model, 64.0)
    norm = math.sqrt(sum(float(g.square().sum()) for n, g in _gradients(model).items() if n.endswith("weight"))) / 64
    penalty.add_gradients_(model, scale=64.0)
    assert penalty.metrics()["rotation/coeff"] == 0.0
    penalty.add_gradients_(model)
    energy = penalty.state_dict()["energy"]
    first = norm / (2 * 0.01 * math.sqrt(energy))
    # R is far above the budget here: lambda answers to the first step's R with the next.
    assert penalty.state_dict()["ascent"][0] == pytest.approx(first, rel=1e-5)
    assert penalty.metrics()["rotation/coeff"] == pytest.approx(first * math.exp(-1.5), rel=1e-5)


def test_a_budget_begins_with_the_learning_rates_of_anchored_weights() -> None:
    found = []
    for others in (0.1, 10.0):
        model, penalty = _moved(budget=0.01, mode="decoupled")
        rates = {id(p): 0.1 if n.endswith("weight") else others for n, p in model.named_parameters()}
        for _ in range(2):
            penalty.after_step_(model, rates)
        found.append(penalty.state_dict()["ascent"])
    assert found[0] == found[1] and found[0] is not None


@pytest.mark.parametrize("strength", [{"coeff": lambda step: 3.0 + step}, {"budget": 0.01}], ids=["coeff", "budget"])
@pytest.mark.parametrize("told", ["by the scale", "by the loop"])
def test_steps_that_a_scaler_skips_do_not_count(told: str, strength: dict[str, Any]) -> None:
    def run(skipped: tuple[int, ...], steps: int) -> tuple[nn.Module, rk.RotationPenalty]:
        model, penalty = _layers(), rk.RotationPenalty(RANK, **strength)
        penalty.anchor(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(steps):
            scaled = scaler.scale(mean_square(model, vectors(SIZES[0])) * (math.inf if step in skipped else 1.0))
            scaled.backward()
            scale = scaler.get_scale()
            if told == "by the loop":
                scaler.unscale_(optimizer)
            penalty.add_gradients_(model, scale if told == "by the scale" else 1.0)
            scaler.step(optimizer)
            scaler.update()
            if told == "by the loop" and scaler.get_scale() < scale:
                penalty.take_back_step()
            optimizer.zero_grad()
        return model, penalty

    (model, penalty), (other, plain) = run((0, 3, 4), 10), run((), 7)
    for found, wanted in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(found, wanted)
    assert penalty.state_dict() == plain.state_dict()
    assert penalty.step == 7 and penalty.metrics() == plain.metrics()


def test_what_was_not_called_cannot_be_taken_back() -> None:
    model, penalty = _moved(coeff=3.0)
    penalty.add_gradients_(model)
    penalty.take_back_step()
    assert penalty.step == 0
    with pytest.raises(ValueError, match="take_back_step: got no call to take back"):
        penalty.take_back_step()
    with pytest.raises(ValueError, match="mode: got 'project' for take_back_step"):
        rk.RotationPenalty(RANK, mode="project", budget=0.1).take_back_step()


# -- copies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["gradient", "decoupled", "project"])
@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
def test_copies_go_on_as_the_original_does(way: str, mode: Any) -> None:
    def step(model: nn.Module, penalty: rk.RotationPenalty, optimizer: torch.optim.Optimizer) -> None:
        _backward(model)
        if mode == "gradient":
            penalty.add_gradients_(model)
        optimizer.step()
        if mode != "gradient":
            penalty.after_step_(model, 1e-3)
        optimizer.zero_grad()

    objects: Any = _layers(), rk.RotationPenalty(RANK, budget=0.01, mode=mode)
    objects[1].anchor(objects[0])
    objects += (torch.optim.AdamW(objects[0].parameters(), 1e-3),)
    for _ in range(4):
        step(*objects)
    copies = copy.deepcopy(objects) if way == "deepcopy" else pickle.loads(pickle.dumps(objects))
    for _ in range(4):
        step(*objects)
        step(*copies)
    for found, wanted in zip(copies[0].parameters(), objects[0].parameters(), strict=True):
        assert found is not wanted and torch.equal(found, wanted)
    assert copies[1].state_dict() == objects[1].state_dict()
    assert copies[1].metrics() == objects[1].metrics()


def test_a_copy_waits_for_the_anchors_of_its_state() -> None:
    model, penalty = _moved(coeff=3.0)
    penalty.add_gradients_(model)
    late = rk.RotationPenalty(RANK - 1)
    late.load_state_dict(penalty.state_dict())
    other = copy.deepcopy(late)
    assert other.step == 1 and other.anchors is None
    with pytest.raises(ValueError, match="path: got no saved anchors for a run that is resumed"):
        other.anchor(model)
    # What is attached to an optimizer is not attached to its copy.
    attached = rk.RotationPenalty(RANK, mode="project", budget=0.1)
    rk.attach(torch.optim.SGD(model.parameters(), 0.1), attached, model)
    assert copy.deepcopy(attached).attached is None


class Named(rk.RotationPenalty):
    def __init__(self, name: str) -> None:
        super().__init__(RANK)
        self.names = [name]


def test_a_copy_has_what_a_subclass_has_added() -> None:
    named = Named("a")
    for other in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert type(other) is Named and other.names == ["a"] and other.names is not named.names


# -- a resumed run ------------------------------------------------------------------------------------------------

STRENGTHS: dict[str, list[dict[str, Any]]] = {
    "gradient": [{"coeff": 1.0}, {"budget": 0.01}],
    "decoupled": [{"coeff": 10.0}, {"budget": 0.01}],
    "project": [{"budget": 0.01}],
}
CASES = [(mode, strength) for mode, strengths in STRENGTHS.items() for strength in strengths]


def _run(mode: Any, strength: dict[str, Any], steps: int, saved: Any = None) -> Any:
    model = _layers()
    penalty = rk.RotationPenalty(RANK, mode=mode, **strength).anchor(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if saved is not None:
        model.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
        # As a framework stores it.
        penalty.load_state_dict(json.loads(json.dumps(saved[2])))
    if mode != "gradient":
        rk.attach(optimizer, penalty, model)
    for _ in range(steps):
        _backward(model)
        if mode == "gradient":
            penalty.add_gradients_(model)
        optimizer.step()
        optimizer.zero_grad()
    return copy.deepcopy([model.state_dict(), optimizer.state_dict(), penalty.state_dict()])


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("mode", "strength"), CASES)
def test_a_resumed_run_has_the_same_bits(mode: str, strength: dict[str, Any], steps: int) -> None:
    whole = _run(mode, strength, 15)
    resumed = _run(mode, strength, 15 - steps, _run(mode, strength, steps))
    for name, tensor in whole[0].items():
        assert torch.equal(tensor, resumed[0][name]), name
    assert whole[2] == resumed[2]


def test_a_state_that_belongs_to_other_anchors_is_refused() -> None:
    model, penalty = _moved(coeff=3.0)
    state = penalty.state_dict()
    for other in (rk.RotationPenalty(RANK - 1), rk.RotationPenalty(RANK, include="0.*")):
        fresh = _layers()
        other.anchor(fresh)
        with pytest.raises(ValueError, match="anchors: got others than the state was saved with"):
            other.load_state_dict(state)
        assert other.step == 0
    moved = rk.RotationPenalty(RANK, basis_dtype=torch.float32).anchor(model)
    with pytest.raises(ValueError, match="anchors: got others than the state was saved with"):
        moved.load_state_dict(state)
    # Before there are anchors, the comparison waits for them.
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    late = rk.RotationPenalty(anchors=anchors)
    late.load_state_dict(state)
    with pytest.raises(ValueError, match="anchors: got others than the state was saved with"):
        late.anchor(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "state: got version 2"),
        ({"mode": "project"}, "state: got one of mode 'project'"),
        ({"step": -1}, "state: got step -1"),
        ({"R": "1"}, "state: got R '1'"),
        ({"ascent": [1.0]}, "state: got ascent"),
        (None, "state: got None"),
    ],
)
def test_states_that_are_none(change: dict[str, Any] | None, message: str) -> None:
    _, penalty = _moved(coeff=3.0)
    before = penalty.state_dict()
    with pytest.raises(ValueError, match=message):
        penalty.load_state_dict(change if change is None else {**before, **change})  # type: ignore[arg-type]
    assert penalty.state_dict() == before


# -- arguments ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "rank: got None without anchors or a path"),
        ({"rank": 0}, "rank: got 0"),
        ({"rank": 1.0}, "rank: got 1.0"),
        ({"rank": True}, "rank: got True"),
        ({"rank": 8, "coeff": -1.0}, "coeff: got -1.0, expected at least 0"),
        ({"rank": 8, "coeff": "1"}, "coeff: got '1'"),
        ({"rank": 8, "warmup": -1}, "warmup: got -1"),
        ({"rank": 8, "mode": "after"}, "mode: got 'after'"),
        ({"rank": 8, "mode": "project"}, "budget: got None in mode 'project'"),
        ({"rank": 8, "budget": 0.0}, "budget: got 0.0, expected a positive number"),
        ({"rank": 8, "budget": True}, "budget: got True"),
        ({"rank": 8, "budget": 0.1, "coeff": 2.0}, "coeff: got 2.0 beside budget=0.1"),
        ({"rank": 8, "budget": 0.1, "warmup": 5}, "warmup: got 5 beside budget=0.1"),
        ({"rank": 8, "anchors": {}}, "anchors: got dict"),
        ({"rank": 8, "path": 3}, "path: got int"),
        ({"rank": 8, "log_every": 0}, "log_every: got 0"),
    ],
)
def test_arguments_that_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rk.RotationPenalty(**arguments)


@pytest.mark.parametrize("argument", [{"include": "*"}, {"exclude": "0.*"}, {"path": "file"}])
def test_options_of_anchors_that_are_given_already(argument: dict[str, Any]) -> None:
    anchors = rk.Anchors.from_model(_layers(), RANK, progress=False)
    (name,) = argument
    with pytest.raises(ValueError, match=f"{name}: got .* beside anchors, expected None"):
        rk.RotationPenalty(anchors=anchors, **argument)


def test_calls_of_another_mode_and_bad_numbers() -> None:
    model, penalty = _moved(coeff=3.0)
    with pytest.raises(ValueError, match=r"got 'gradient' for after_step_, .* call add_gradients_"):
        penalty.after_step_(model, lr=0.1)
    after = rk.RotationPenalty(RANK, mode="decoupled")
    for call in (after.add_gradients_, after.loss_term):
        with pytest.raises(ValueError, match=r"got 'decoupled' for \w+, expected gradient: call after_step_"):
            call(model)
    for scale in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="scale|coeff"):
            penalty.add_gradients_(model, scale=scale)
    falling = rk.RotationPenalty(RANK, coeff=lambda step: -1.0)
    with pytest.raises(ValueError, match="coeff: got -1.0 at step 0"):
        falling.add_gradients_(model)
    assert penalty.step == falling.step == after.step == 0


def test_a_compiled_call_is_refused() -> None:
    model, penalty = _moved(coeff=3.0)

    def compiled() -> Tensor:
        return penalty.add_gradients_(model)

    torch.compiler.is_compiling, kept = lambda: True, torch.compiler.is_compiling
    try:
        with pytest.raises(ValueError, match="add_gradients_: got a call that is compiled or captured"):
            compiled()
    finally:
        torch.compiler.is_compiling = kept


def test_repr_says_where_a_run_is() -> None:
    assert repr(rk.RotationPenalty(4, budget=0.02)) == (
        "RotationPenalty(rank=4, budget=0.02, mode='gradient', step=0; not anchored)"
    )
    model, penalty = _moved(coeff=3.0)
    penalty.add_gradients_(model)
    assert repr(penalty) == f"RotationPenalty(rank={RANK}, coeff=3.0, mode='gradient', step=1; {penalty.anchors!r})"
