"""Blocks that another arithmetic has computed are reported once, in one warning, at the line of the caller."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from rpsft_kernels import Anchor, accumulate_rotation_grad_, rotation_penalty
from support import random_matrix

pytestmark = pytest.mark.usefixtures("reference_arithmetic")

Call = Callable[..., object]


def _accumulate(weights: object, anchors: object) -> object:
    return accumulate_rotation_grad_(weights, anchors, 1.0)  # type: ignore[arg-type]


CALLS: list[Call] = [rotation_penalty, _accumulate]


def _anchored(
    form: str = "block", device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Anchor]:
    pretrained = random_matrix(20, 12, dtype, scale=0.2, device=device)
    anchor = Anchor.from_weight(pretrained, 12 if form == "full" else 3, keep_base=form != "block")
    assert anchor.form == form
    return (1.01 * pretrained).requires_grad_(), anchor


def _computed_by(arithmetic: str | None, anchor: Anchor) -> Anchor:
    """The same anchor, as if another arithmetic had computed its block."""
    return Anchor(
        **anchor.pieces(),  # type: ignore[arg-type]
        shape=anchor.shape,
        weight_dtype=anchor.weight_dtype,
        rank=anchor.rank,
        energy=anchor.energy,
        arithmetic=arithmetic,
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_foreign_block_is_reported_once(call: Call) -> None:
    weight, anchor = _anchored()
    for arithmetic in ("triton:sm_90:float32", "torch:cpu:bfloat16", None):
        foreign = _computed_by(arithmetic, anchor)
        with pytest.warns(UserWarning, match=f"the anchor's block was computed by {arithmetic!r}") as caught:
            call([weight, weight], [anchor, foreign])
        assert len(caught) == 1
        message = str(caught[0].message)
        assert message.startswith("weights[1]: ") and "is used by 'torch:cpu:float32'" in message
        assert "of the order of 1.4e-14 ||B||_F^2" in message and "Anchors.load(path, model)" in message
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            call([weight, weight], [anchor, foreign])
            call(weight, foreign)


def test_the_warning_points_at_the_line_of_the_call() -> None:
    weight, anchor = _anchored()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rotation_penalty(weight, _computed_by("elsewhere", anchor))
        accumulate_rotation_grad_(weight, _computed_by("elsewhere", anchor), 1.0)
    assert {warning.filename for warning in caught} == {__file__}
    lines, first = inspect.getsourcelines(test_the_warning_points_at_the_line_of_the_call)
    calls = [lines[warning.lineno - first].split("(")[0].strip() for warning in caught]
    assert calls == ["rotation_penalty", "accumulate_rotation_grad_"]


def test_every_foreign_anchor_is_reported() -> None:
    """Even if each lies at the address of the one before it."""
    weight, anchor = _anchored()
    for _ in range(20):
        with pytest.warns(UserWarning, match="the anchor's block was computed by 'elsewhere'"):
            rotation_penalty(weight, _computed_by("elsewhere", anchor))


def _model() -> tuple[nn.Module, dict[str, Anchor]]:
    """A model with blocks of three arithmetics, one of which is that of the tests."""
    model = nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(4)))
    anchors = dict(rk.Anchors.from_model(model, 3, keep_base=False, progress=False))
    for name, arithmetic in (("0.weight", "elsewhere"), ("1.weight", "there"), ("3.weight", "elsewhere")):
        anchors[name] = _computed_by(arithmetic, anchors[name])
    return model, anchors


def test_one_warning_names_all_foreign_blocks() -> None:
    with pytest.warns(UserWarning, match="the anchor's block was computed") as caught:
        rotation_penalty(*_model())
    (warning,) = caught
    used = "and is used by 'torch:cpu:float32'"
    assert str(warning.message).startswith(
        f"0.weight, 3.weight: the anchor's block was computed by 'elsewhere' {used}; "
        f"1.weight: the anchor's block was computed by 'there' {used}, which rounds differently"
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_warning_that_is_an_error_hides_no_block(call: Call) -> None:
    """It names them all, changes nothing, and the next call is not refused for them."""
    model, anchors = _model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"^0\.weight, 3\.weight: .*; 1\.weight: "):
            call(model, anchors)
        assert all(parameter.grad is None for parameter in model.parameters())
        call(model, anchors)


def test_blocks_of_this_arithmetic_and_other_forms_are_not_reported(device: torch.device) -> None:
    with warnings.catch_warnings():
        # Only the package's own category: Triton's interpreter has other warnings.
        warnings.simplefilter("error", UserWarning)
        for backend in ("torch", "triton"):
            with rk.use_backend(backend):
                for form in ("base", "block", "full"):
                    rotation_penalty(*_anchored(form, device))
        weight, anchor = _anchored()
        rotation_penalty(weight, _computed_by("elsewhere", anchor).rebuilt_block(weight))


def test_the_residual_of_a_foreign_block_is_of_the_order_reported(device: torch.device) -> None:
    pretrained = random_matrix(96, 64, device=device)
    with rk.use_backend("triton"):
        anchor = Anchor.from_weight(pretrained, 16, keep_base=False)
        assert rotation_penalty(pretrained, anchor).item() == 0.0
    with rk.use_backend("torch"), pytest.warns(UserWarning, match="of the order of") as caught:
        penalty = rotation_penalty(pretrained, anchor).item()
    reported = float(str(caught[0].message).split("of the order of ")[1].split(" ||B||_F^2")[0])
    assert anchor.block is not None
    assert 0 < penalty < 100 * reported * float(anchor.block.square().sum())
