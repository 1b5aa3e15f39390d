"""A weight that left its tie, and two anchored weights that have become one, are refused wherever anchors are used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpsft_kernels as rk
from small_models import refused

UNTIED = "head.weight: got a parameter of its own, anchored as one with embed.weight"
JOINED = "head.weight: got one parameter with embed.weight, anchored as two"


class _Model(nn.Module):
    """An embedding and a head of one shape, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.head = nn.Linear(6, 8, bias=False)
        if tied:
            self.head.weight = self.embed.weight


def _by_hand(model: _Model) -> None:
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())


def _to_empty(model: _Model) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)


def _tie(model: _Model) -> None:
    model.head.weight = model.embed.weight


def _uses(model: nn.Module, anchors: rk.Anchors) -> dict[str, Callable[[], Any]]:
    return {
        "accumulate": lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0),
        "penalty": lambda: rk.rotation_penalty(model, anchors),
        "verify": lambda: anchors.verify(model),
        "rebuilt": lambda: anchors.rebuilt(model),
    }


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize(
    ("tied", "change", "message"), [(True, _by_hand, UNTIED), (True, _to_empty, UNTIED), (False, _tie, JOINED)]
)
def test_another_tie_is_refused(
    tied: bool, change: Callable[[_Model], None], message: str, used_before: bool, tmp_path: Path
) -> None:
    model = _Model(tied)
    with torch.no_grad():
        # Verification cannot tell the two by their values.
        model.head.weight.copy_(model.embed.weight)
    anchors = rk.Anchors.from_model(model, 2, progress=False)
    anchors.save(tmp_path / "anchors")
    if used_before:
        rk.accumulate_rotation_grad_(model, anchors, 1.0)
    change(model)
    model.zero_grad()
    loaded = rk.Anchors.load(tmp_path / "anchors")
    for kept in (anchors, loaded, anchors.to("cpu")):
        for use in _uses(model, kept).values():
            assert message in refused(use)
    assert message in refused(lambda: rk.Anchors.load(tmp_path / "anchors", model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_way_out_is_named() -> None:
    model = _Model(True)
    anchors = rk.Anchors.from_model(model, 2, progress=False)
    _by_hand(model)
    with pytest.raises(ValueError, match=r"model: 1 .*expected .*tie .*fully_shard"):
        rk.rotation_penalty(model, anchors)
    _tie(model)
    assert rk.rotation_penalty(model, anchors).item() == 0.0


def test_a_tie_whose_weight_has_no_anchor_may_come_undone() -> None:
    model = nn.ModuleDict({"tied": _Model(True), "other": nn.Linear(6, 6, bias=False)})
    anchors = rk.Anchors.from_model(model, 2, exclude="*embed*", progress=False)
    _by_hand(model["tied"])  # type: ignore[arg-type]
    anchors.verify(model)
    assert rk.rotation_penalty(model, anchors).item() == 0.0


def test_names_that_a_stage_does_not_have_are_passed_over() -> None:
    model = _Model(True)
    anchors = rk.Anchors.from_model(model, 2, progress=False)
    stage = nn.ModuleDict({"embed": model.embed})
    anchors.verify(stage)
    assert rk.rotation_penalty(stage, anchors).item() == 0.0
