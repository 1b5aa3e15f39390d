"""A plan is used as long as nothing changes that it depends on. Every change is made between two calls, and the second
call is compared with one that prepares its own plan.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from mutations import MUTATIONS
from plan_ranks import Reshards, reshards
from plans import COEFF, RANK, Case, Layers, both_calls, check, forget, move, no_new_plan, same
from ranks import needs_fsdp2, run_ranks
from rpsft_kernels.evaluation import plan
from small_models import refused

BACKENDS = ("native", "torch", "triton")
# Changes that a plan does not depend on: after them it must be recalled.
SAME_PLAN = {
    "values",
    "address",
    "misaligned",
    "transposed",
    "padded",
    "sliced",
    "loaded",
    "no gradients",
    "some gradients",
    "gradients elsewhere",
    "gradients transposed",
    "gradients sliced",
    "gradients in one buffer",
    "coeff",
    "two parameters swapped",
    "new parameter",
    "loaded, assigned",
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels on the CPU take TRITON_INTERPRET=1, set before the start")
    with rk.use_backend(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _no_plans() -> Iterator[None]:
    forget()
    yield
    forget()


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract:UserWarning")
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_between_two_calls_is_seen(name: str, backend: str) -> None:
    case = Case.make()
    if name == "untied":
        MUTATIONS["tied"](case)
    if name == "an anchor more":
        MUTATIONS["an anchor less"](case)
    # Triton's interpreter is slow.
    brief = backend == "triton"
    case.calls()
    # The second call adds to gradients that the first has made, with other operations.
    rk.accumulate_rotation_grad_(case.model, case.anchors, case.coeff)
    MUTATIONS[name](case)
    case.check(lists=not brief)
    if not brief:
        # By now gradients exist, and nothing has changed since the last call.
        case.check()


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout contract:UserWarning")
@pytest.mark.parametrize("name", sorted(SAME_PLAN))
def test_a_change_that_a_plan_does_not_depend_on_makes_no_other(name: str) -> None:
    case = Case.make()
    rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
    MUTATIONS[name](case)
    with no_new_plan():
        rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
        rk.rotation_penalty(case.model, case.anchors).backward()  # type: ignore[no-untyped-call]


class LowRank(nn.Module):
    """An adapter, under which the wrapped weight has another path."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(24, 2, bias=False)
        self.up = nn.Linear(2, 40, bias=False)


def test_adapters_come_and_go(backend: str) -> None:
    case = Case.make()
    case.calls()
    inner = case.model.first
    for _ in range(1 if backend == "triton" else 2):
        case.model.first = LowRank(inner)  # type: ignore[arg-type]
        assert "'first.weight'" in refused(lambda: rk.rotation_penalty(case.model, case.anchors))
        move(case.model, seed=2)
        renamed = {name.replace("first.", "first.base."): anchor for name, anchor in case.anchors.items()}
        Case(case.model, renamed).check(lists=False)
        case.model.first = inner
        case.check(lists=False)


@pytest.mark.parametrize("call", ["penalty", "accumulate"])
def test_a_parameter_that_is_gone_is_refused(call: str, backend: str) -> None:
    case = Case.make()
    case.calls()

    def again() -> object:
        if call == "penalty":
            return rk.rotation_penalty(case.model, case.anchors)
        return rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)

    weight = case.model.first.weight
    for value in (None, "deleted"):
        if value is None:
            case.model.first.weight = None  # type: ignore[assignment]
        else:
            del case.model.first.weight
        assert "'first.weight'" in refused(again)
    case.model.first.weight = weight
    again()
    del case.model.first
    assert "'first.weight'" in refused(again)


def test_a_call_with_a_plan_refuses_as_a_first_call_does(backend: str) -> None:
    case = Case.make()
    case.calls()
    first = case.model.first
    data = first.weight.data
    first.weight.grad = None  # type: ignore[union-attr]
    first.weight.data = torch.randn(24, 40)
    assert "got shape (24, 40), expected (40, 24)" in refused(lambda: rk.rotation_penalty(case.model, case.anchors))
    first.weight.data = data
    first.weight.grad = torch.zeros(40, 24).to_sparse()  # type: ignore[union-attr]
    assert "got layout" in refused(lambda: rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF))
    first.weight.grad = None  # type: ignore[union-attr]
    assert "coeff: got nan" in refused(lambda: rk.accumulate_rotation_grad_(case.model, case.anchors, float("nan")))
    for parameter in case.parameters():
        parameter.requires_grad_(False)
    assert "frozen" in refused(lambda: rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF))
    assert all(parameter.grad is None or parameter is not first.weight for parameter in case.parameters())


def test_one_weight_and_a_list_of_one_are_two_calls() -> None:
    """A pair that is refused at first is refused after the other kind of call has been accepted."""
    weight = torch.randn(24, 40, requires_grad=True)
    anchor = rk.Anchor.from_weight(weight, RANK)
    rk.rotation_penalty(weight, anchor)
    rk.rotation_penalty([weight], [anchor])
    for weights, anchors in (([weight], anchor), (weight, [anchor])):
        assert refused(lambda w=weights, a=anchors: rk.rotation_penalty(w, a)).startswith("anchors: got")  # type: ignore[misc]


def test_an_anchor_at_the_address_of_one_that_is_gone(backend: str) -> None:
    """A plan tells it from the other anchor, even if their facts are equal."""
    case = Case.make()
    case.calls()
    before = case.anchors["first.weight"]
    address = id(before)
    # Two plans of one model, of which the newer has never had the anchor that goes.
    case.anchors["first.weight"] = rk.Anchor.from_weight(torch.randn(40, 24), RANK)
    case.calls()
    fields = {"shape": before.shape, "weight_dtype": before.weight_dtype, "rank": RANK, "energy": 1.0}
    pieces = {name: torch.randn(piece.shape).to(piece.dtype) for name, piece in before.pieces().items()}
    del before
    others = []
    for _ in range(200):
        others.append(rk.Anchor(**pieces, **fields))  # type: ignore[arg-type]
        if id(others[-1]) == address:
            break
    case.anchors["first.weight"] = others[-1]
    case.check(lists=False)


# -- lists ----------------------------------------------------------------------------------------------------


def test_lists_with_a_weight_twice(backend: str) -> None:
    case = Case.make()
    square, twin = case.model.square.weight, case.model.twin.weight
    anchors = [case.anchors["square.weight"], case.anchors["twin.weight"]] * 2
    lists = ([square, twin] * 2, [square] * 4, [twin, square, square, twin])
    for weights in lists[: 1 if backend == "triton" else 3]:
        for grad in (None, torch.ones(32, 32)):
            for weight in (square, twin):
                weight.grad = grad if grad is None else grad.clone()  # type: ignore[union-attr, assignment]
            check(weights, anchors, weights, anchors)  # type: ignore[arg-type]


def test_lists_of_temporaries(backend: str) -> None:
    """They are new tensors at every step; their leaves get the gradients."""
    case = Case.make()
    anchors = list(case.anchors.values())

    def penalty() -> Tensor:
        return rk.rotation_penalty([parameter * 1.0 for parameter in case.parameters()], anchors)

    for seed in range(2):
        move(case.model, seed)
        value = penalty()
        pulled = torch.autograd.grad(value, case.parameters())
        expected, _, gradients = both_calls(case.parameters(), anchors, case.parameters(), COEFF, True)
        assert value == expected
        assert all(map(same, pulled, gradients))
        case.model.zero_grad()
    assert len(plan._cache) <= 2


def test_temporaries_use_one_plan() -> None:
    case = Case.make()
    anchors = list(case.anchors.values())
    rk.rotation_penalty([parameter * 1.0 for parameter in case.parameters()], anchors)
    with no_new_plan():
        for _ in range(3):
            rk.rotation_penalty([parameter * 1.0 for parameter in case.parameters()], anchors)


# -- what is around a call ----------------------------------------------------------------------------------


def _penalty(case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    penalty = rk.rotation_penalty(case.model, case.anchors)
    return penalty.detach(), torch.autograd.grad(penalty, case.parameters())


def test_the_backend_in_force_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case.make()
    names = [name for name in BACKENDS if name != "triton" or os.environ.get("TRITON_INTERPRET") == "1"]
    fresh = {}
    for name in names:
        forget()
        with rk.use_backend(name):
            fresh[name] = _penalty(case)
    bits = {(float(penalty), *(float(g.sum()) for g in gradients)) for penalty, gradients in fresh.values()}
    assert len(bits) == len(names), "backends must round differently here"
    forget()
    for name in [*names, *reversed(names)]:
        with rk.use_backend(name):
            penalty, gradients = _penalty(case)
            assert penalty == fresh[name][0] and all(map(same, gradients, fresh[name][1]))
            inner = names[names.index(name) - 1]
            with rk.use_backend(inner):
                assert _penalty(case)[0] == fresh[inner][0]
        monkeypatch.setenv("RPSFT_BACKEND", name)
        assert _penalty(case)[0] == fresh[name][0]
        monkeypatch.delenv("RPSFT_BACKEND")
    # A backward pass stays with its forward pass.
    with rk.use_backend(names[0]):
        penalty = rk.rotation_penalty(case.model, case.anchors)
    with rk.use_backend(names[1]):
        gradients = torch.autograd.grad(penalty, case.parameters())
    assert all(map(same, gradients, fresh[names[0]][1]))
    monkeypatch.setenv("RPSFT_BACKEND", "nothing")
    assert "RPSFT_BACKEND" in refused(lambda: rk.rotation_penalty(case.model, case.anchors))


def test_grad_modes_in_turn(backend: str) -> None:
    case = Case.make()
    expected, _, gradients = both_calls(case.model, case.anchors, case.parameters(), COEFF, True)
    modes: list[Any] = [torch.no_grad, torch.enable_grad, torch.inference_mode, torch.enable_grad]
    for mode in modes:
        with mode():
            penalty = rk.rotation_penalty(case.model, case.anchors)
        assert penalty.requires_grad == (mode is torch.enable_grad)
        assert penalty.detach().equal(expected)
        if penalty.requires_grad:
            assert all(map(same, torch.autograd.grad(penalty, case.parameters()), gradients))


def test_a_plan_of_inference_mode_serves_training(backend: str) -> None:
    """Whatever memory it has must not be of inference mode."""
    case = Case.make()
    with torch.inference_mode():
        rk.rotation_penalty(case.model, case.anchors)
    MUTATIONS["address"](case)
    case.check(lists=False)


def test_autocast_changes_nothing(backend: str) -> None:
    case = Case.make()
    expected, _, gradients = both_calls(case.model, case.anchors, case.parameters(), COEFF, True)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            results = both_calls(case.model, case.anchors, case.parameters(), COEFF, False)
        assert same(results[0], expected) and all(map(same, results[2], gradients))
        case.model.zero_grad()


def test_gradients_that_change_have_another_version(backend: str) -> None:
    """Autograd refuses to use what it has saved of them before."""
    case = Case.make()
    MUTATIONS["gradients elsewhere"](case)
    leaf = torch.ones((), requires_grad=True)
    for _ in range(2):
        loss = torch.stack([(leaf * parameter.grad).sum() for parameter in case.parameters()]).sum()
        rk.accumulate_rotation_grad_(case.model, case.anchors, COEFF)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()  # type: ignore[no-untyped-call]


# -- sharded over processes --------------------------------------------------------------------------------


@needs_fsdp2
@pytest.mark.parametrize("size", [1, 2])
def test_fsdp2_reshards_between_calls(size: int) -> None:
    results: list[Reshards] = run_ranks(size, reshards)
    for result in results:
        assert result.differences == {}
        # The same bits on every rank.
        assert result.penalties == results[0].penalties


def test_layers_have_every_form() -> None:
    case = Case.make(Layers())
    assert {anchor.form for anchor in case.anchors.values()} == {"base", "full"}
