"""Weights that are not those which were anchored are reported once, with the worst by name."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distance_ranks import use_a_far_shard
from ranks import run_ranks
from rpsft_kernels import Anchor, Anchors, accumulate_rotation_grad_, rotation_penalty
from rpsft_kernels.evaluation import distance
from support import exact_penalty, random_matrix

pytestmark = pytest.mark.usefixtures("reference_arithmetic")

FORMS = ("base", "block", "full")
FAR = "are far from those that were anchored"
ROUNDED = "differ from what was anchored by no more than rounding|for blocks of"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _accumulate(weights: object, anchors: object) -> object:
    return accumulate_rotation_grad_(weights, anchors, 1.0)  # type: ignore[arg-type]


CALLS: list[Callable[..., object]] = [rotation_penalty, _accumulate]


def _anchor(weight: Tensor, form: str) -> Anchor:
    return Anchor.from_weight(weight, min(weight.shape) if form == "full" else 6, keep_base=form != "block")


def _warnings_of(weights: object, anchors: object, call: Callable[..., object] = rotation_penalty) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(weights, anchors)
    assert all(warning.category is UserWarning for warning in caught)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_unrelated_weights_are_reported_once(form: str, call: Callable[..., object]) -> None:
    weights = [random_matrix(24, 40, seed=seed).requires_grad_() for seed in (1, 2, 3)]
    anchors = [_anchor(random_matrix(24, 40, seed=seed), form) for seed in (1, 5, 6)]
    with torch.no_grad():
        weights[2] *= 3
    message, *others = _warnings_of(weights, anchors, call)
    assert not others
    assert message.startswith(f"weights: 2 of 3 {FAR}: weights[2] (")
    assert ", weights[1] (1." in message and "weights[0]" not in message and "expected less than 0.5 ||W0||" in message
    assert _warnings_of(weights, anchors, call) == _warnings_of(weights[1], anchors[1], call) == []


def test_a_pipeline_stage_that_numbers_its_layers_anew() -> None:
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(4)))
    anchors = Anchors.from_model(model, 8, progress=False)
    stage = nn.Sequential(*model[2:])
    (message,) = _warnings_of(stage, {name: anchors[name] for name in ("0.weight", "1.weight")})
    assert message.startswith(f"weights: 2 of 2 {FAR}: ") and "(of this pipeline stage)" in message


@pytest.mark.parametrize("form", FORMS)
def test_weights_anchored_before_their_values_came(form: str) -> None:
    (message,) = _warnings_of(random_matrix(24, 40), _anchor(torch.zeros(24, 40), form))
    assert "weights (W0 is all zeros: anchored before its values came, or trained from zeros)" in message
    assert _warnings_of(torch.zeros(24, 40), _anchor(torch.zeros(24, 40), form)) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("share", [0.0, 1e-3, 0.05, 0.3])
def test_a_resumed_run_is_not_reported(share: float, form: str) -> None:
    pretrained = random_matrix(64, 48)
    assert _warnings_of(pretrained + share * random_matrix(64, 48, seed=1), _anchor(pretrained, form)) == []


@pytest.mark.parametrize("form", FORMS)
def test_it_is_measured_as_far_as_it_is(form: str) -> None:
    pretrained = random_matrix(64, 48)
    weight = pretrained + 2 * random_matrix(64, 48, seed=1)
    anchor = Anchor.from_weight(pretrained, 48 if form == "full" else 24, keep_base=form != "block")
    (message,) = _warnings_of(weight, anchor)
    moved, whole = (weight - pretrained).double(), pretrained.double()
    if form == "block":
        assert anchor.left is not None and anchor.right is not None
        moved, whole = (anchor.left.double().T @ matrix @ anchor.right.double() for matrix in (moved, whole))
    found = float(message.split("weights (")[1].split(" ")[0])
    assert found == pytest.approx(float(moved.norm() / whole.norm()), rel=0.2 if form == "block" else 0.03)


@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_anchors_of_another_precision_are_reported_where_rounding_outweighs_a_step(
    form: str, kept: torch.dtype, backend: str
) -> None:
    checkpoint = random_matrix(128, 96, scale=0.02)
    for held in DTYPES:
        anchor = _anchor(checkpoint.to(kept), form)
        weight = checkpoint.to(held)
        messages = _warnings_of(weight, anchor)
        exact = _anchor(checkpoint.double(), "full" if form == "full" else "base")
        of_a_step = exact_penalty(checkpoint.double() + 1e-6 * random_matrix(128, 96, seed=1).sign(), exact)
        is_outweighed = float(rotation_penalty(weight, anchor)) > 10 * float(of_a_step)
        assert len(messages) == is_outweighed, (held, messages)
        assert all(re.search(ROUNDED, message) for message in messages)


@pytest.mark.parametrize("steps", [1, 30, 1000, 30000])
def test_float32_masters_of_anchored_bfloat16_weights_are_not_reported(steps: int) -> None:
    """W0 is exact in both, and drifts of training move small weights as far as large ones."""
    pretrained = random_matrix(128, 96, torch.bfloat16, scale=0.02)
    masters = pretrained.float() + 1e-6 * steps**0.8 * random_matrix(128, 96, seed=1)
    for form in ("base", "full"):
        assert _warnings_of(masters, _anchor(pretrained, form)) == []


@pytest.mark.parametrize("call", CALLS)
def test_a_warning_that_is_an_error_changes_nothing(call: Callable[..., object]) -> None:
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(3)))
    anchors = Anchors.from_model(model, 3, progress=False)
    with torch.no_grad():
        for parameter in model[:2].parameters():
            parameter.mul_(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=rf"2 of 3 {FAR}: (0\.weight .2 .*1\.weight|1\.weight .2 .*0\.weight)"):
            call(model, anchors)
        assert all(parameter.grad is None for parameter in model.parameters())
        call(model, anchors)


def test_the_warning_points_at_the_line_of_the_call() -> None:
    with pytest.warns(UserWarning, match=FAR) as caught:
        rotation_penalty(random_matrix(8, 8, seed=2), _anchor(random_matrix(8, 8), "base"))
    assert [warning.filename for warning in caught] == [__file__]


def test_the_measurement_leaves_the_generators_of_random_numbers_alone() -> None:
    state = torch.get_rng_state()
    for form in FORMS:
        rotation_penalty(random_matrix(24, 40), _anchor(random_matrix(24, 40), form))
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_of_a_chunk_is_left_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left would split the memory that it has freed, and the process would grow by a float32 copy of W."""
    left: list[weakref.ref[Tensor]] = []
    compare = distance._compare

    def watch(*arguments: Any) -> Tensor:
        assert all(reference() is None for reference in left)
        norms = compare(*arguments)
        left.append(weakref.ref(norms))
        return norms

    monkeypatch.setattr(distance, "_compare", watch)
    rotation_penalty(random_matrix(24, 40), _anchor(random_matrix(24, 40), "base"))
    assert len(left) == 8


def test_nan_is_no_distance() -> None:
    weight = random_matrix(24, 40)
    anchor = _anchor(weight, "base")
    weight[0, 0] = float("nan")
    assert _warnings_of(weight, anchor) == []


def test_each_rank_decides_by_its_own_shard() -> None:
    """Where warnings are errors the other rank refuses with it, and nobody waits."""
    odd, other = run_ranks(2, use_a_far_shard, 0)
    for first, second in (odd[:2], odd[2:]):
        assert first.kind == "UserWarning" and "1 of 1 are far" in first.message and first.unchanged
        assert not second.kind and second.penalty > 0
    for first, second in (other[:2], other[2:]):
        assert first.kind == "ValueError" and "rank 0 refused this call" in first.message and first.unchanged
        assert not second.kind and second.penalty > 0
