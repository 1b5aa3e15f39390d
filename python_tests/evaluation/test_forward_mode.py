"""Tangents of forward-mode differentiation are refused, not lost."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import rpsft_kernels as rk
from support import exact_gradient, random_matrix

MESSAGE = "got a tensor with a tangent of forward-mode differentiation, expected one without"


def _anchored() -> tuple[Tensor, rk.Anchor, Tensor]:
    """A weight, its anchor and a direction."""
    pretrained = random_matrix(24, 40, torch.float32)
    anchor = rk.Anchor.from_weight(pretrained, 4)
    return pretrained + 0.1 * random_matrix(24, 40, seed=1), anchor, random_matrix(24, 40, seed=2)


def _dual(weight: Tensor, direction: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(weight, direction)  # type: ignore[no-untyped-call]
    return dual


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_tangent_is_refused(requires_grad: bool, planned: bool, backend: str) -> None:
    weight, anchor, direction = _anchored()
    weight.requires_grad_(requires_grad)
    if planned:
        rk.rotation_penalty([weight], [anchor])
    with forward_ad.dual_level():
        dual = _dual(weight, direction)
        with pytest.raises(ValueError, match=rf"^weights\[0\]: {MESSAGE}"):
            rk.rotation_penalty([dual], [anchor])
        with torch.no_grad(), pytest.raises(ValueError, match=MESSAGE):
            rk.rotation_penalty([dual], [anchor])
        with pytest.raises(ValueError, match=f"^weight: {MESSAGE}"):
            rk.project(dual, anchor.left, anchor.right)  # type: ignore[arg-type]
        # Other tensors may have tangents.
        rk.rotation_penalty([weight], [anchor])


@pytest.mark.parametrize("transform", ["jvp", "jacfwd"])
def test_transforms_of_forward_mode_are_refused(transform: str) -> None:
    weight, anchor, direction = _anchored()
    transforms: dict[str, Callable[[], object]] = {
        "jvp": lambda: torch.func.jvp(lambda w: rk.rotation_penalty(w, anchor), (weight,), (direction,)),
        "jacfwd": lambda: torch.func.jacfwd(lambda w: rk.rotation_penalty(w, anchor))(weight),
    }
    with pytest.raises(ValueError, match=f"^weights: {MESSAGE}"):
        transforms[transform]()


@pytest.mark.parametrize("call", [rk.rotation_penalty, partial(rk.accumulate_rotation_grad_, coeff=1.0)])
def test_a_module_with_a_tangent_is_refused(call: Callable[..., object]) -> None:
    model = nn.Linear(40, 24, bias=False)
    anchors = rk.Anchors.from_model(model, 4, progress=False)
    with forward_ad.dual_level():
        model._parameters["weight"] = _dual(model.weight.detach(), torch.ones(24, 40))  # type: ignore[assignment]
        with pytest.raises(ValueError, match=f"^weight: {MESSAGE}"):
            call(model, anchors)


def test_the_way_out_of_the_message(backend: str) -> None:
    weight, anchor, direction = _anchored()
    expected = float((exact_gradient(weight, anchor) * direction).sum())
    _, derivative = torch.autograd.functional.jvp(lambda w: rk.rotation_penalty(w, anchor), weight, direction)  # type: ignore[no-untyped-call]
    assert float(derivative) == pytest.approx(expected, rel=0.02)
