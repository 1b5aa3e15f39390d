"""One warning where a good part of a model gets no anchor, with names and shares."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import nn

import rpsft_kernels as rk


class _Experts(nn.Module):
    """A router of 48 elements, and experts of 96 n and 48 n."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.router = nn.Linear(8, 6)
        self.up = nn.Parameter(torch.ones(count, 8, 12).to(dtype), requires_grad=False)
        self.down = nn.Parameter(torch.ones(count, 6, 8).to(dtype), requires_grad=False)


def _warnings(model: nn.Module, exclude: Sequence[str] = ()) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rk.Anchors.from_model(model, 2, exclude=exclude, progress=False)
    return [warning for warning in caught if issubclass(warning.category, UserWarning)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_experts_are_named_with_their_shares(dtype: torch.dtype) -> None:
    (warning,) = _warnings(_Experts(99, dtype))
    message = str(warning.message)
    assert message.startswith("model: 99.7% of the elements of its floating-point parameters")
    assert "up (66.4%, 3-D), down (33.2%, 3-D); expected 2-D weights" in message
    # It points at the call.
    assert warning.filename == __file__


@pytest.mark.parametrize(("rows", "warns"), [(48, True), (47, False)])
def test_a_fifth_is_the_bound(rows: int, warns: bool) -> None:
    model = nn.ParameterDict({"plain": torch.ones(16, 12), "stack": torch.ones(rows, 1, 1), "vector": torch.ones(999)})
    assert bool(_warnings(model)) == warns


def test_many_are_counted() -> None:
    model = nn.ModuleDict({str(i): _Experts(2) for i in range(4)})
    (warning,) = _warnings(model)
    assert "0.up (14.3%, 3-D)" in str(warning.message) and " and 3 more; expected" in str(warning.message)


def test_what_was_excluded_is_meant() -> None:
    assert not _warnings(_Experts(99), exclude=["up", "down"])
    (warning,) = _warnings(_Experts(99), exclude=["up"])
    assert "model: 99.0% of" in str(warning.message) and "up (" not in str(warning.message)


def test_integers_and_vectors_do_not_count() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter("table", nn.Parameter(torch.ones(99, 9, 9, dtype=torch.int8), requires_grad=False))
    model.register_parameter("vector", nn.Parameter(torch.ones(999)))
    assert not _warnings(model)


def test_a_tied_weight_counts_once() -> None:
    model = nn.ModuleDict({"first": nn.Conv2d(2, 2, 2), "second": nn.Conv2d(2, 2, 2), "plain": nn.Linear(17, 3)})
    assert len(_warnings(model)) == 1
    model["second"].weight = model["first"].weight  # type: ignore[union-attr]
    model["plain"].weight = nn.Parameter(torch.ones(13, 5))  # type: ignore[union-attr]
    assert not _warnings(model)


def test_where_warnings_are_errors_nothing_is_made() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="get no anchor"):
            rk.Anchors.from_model(_Experts(9), 2, progress=False)
