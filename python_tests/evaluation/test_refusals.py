"""A launch that has no code is refused before anything has changed.

The tests run interpreted kernels on the CPU; they make up which launch is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels import Anchor, accumulate_rotation_grad_, rotation_penalty, use_backend
from rpsft_kernels.ops.triton import launch
from rpsft_kernels.ops.triton.variants import Variant

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="kernels on the CPU take TRITON_INTERPRET=1, set before the start"
)
WRONG = "it may compute wrong numbers"


def anchored(shape: tuple[int, int], basis: torch.dtype, weight: torch.dtype) -> tuple[Tensor, Anchor]:
    """A weight that requires grad, at some distance from its anchor."""
    left, right = (torch.linalg.qr(torch.randn(n, 4))[0].to(basis) for n in shape)
    base = torch.randn(shape).to(weight)
    anchor = Anchor(left=left, right=right, base=base, shape=shape, weight_dtype=weight, rank=4, energy=1.0)
    return (base + 0.1 * torch.randn(shape).to(weight)).requires_grad_(), anchor


class Launches:
    """Refuses to prepare one kernel with subspaces of one dtype, and records the other launches.

    Attributes:
        kernel, basis: the kernel and the dtype of U and V that are refused.
        prepared, started: names of kernels, in the order of the calls.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = ""
        self.basis: str | None = None
        self.prepared: list[str] = []
        self.started: list[str] = []
        find = launch.find_start

        def refuse_or_record(variant: Variant, *rest: Any) -> Callable[[], None]:
            self.prepared.append(variant.kernel)
            if variant.kernel == self.kernel and dict(variant.constants).get("BASIS_TYPE") == self.basis:
                raise ValueError(WRONG)
            start = find(variant, *rest)

            def record_and_start() -> None:
                self.started.append(variant.kernel)
                start()

            return record_and_start

        monkeypatch.setattr(launch, "find_start", refuse_or_record)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    with use_backend("triton"):
        yield Launches(monkeypatch)


@pytest.fixture
def pairs() -> tuple[list[Tensor], list[Anchor]]:
    """Weights under a full anchor, bfloat16 subspaces and float32 subspaces, which form three buckets."""
    full = torch.randn(6, 5)
    first = full + 0.1
    anchor = Anchor(base=full, shape=(6, 5), weight_dtype=torch.float32, rank=5, energy=1.0)
    anchored_weights = [(first.requires_grad_(), anchor)]
    anchored_weights.append(anchored((24, 40), torch.bfloat16, torch.bfloat16))
    anchored_weights.append(anchored((40, 24), torch.float32, torch.float32))
    return [weight for weight, _ in anchored_weights], [anchor for _, anchor in anchored_weights]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("kernel", "basis"),
    [
        ("project", "bf16"),
        ("project", "fp32"),
        ("drift", "fp32"),
        ("pull", "bf16"),
        ("gradient", "bf16"),
        ("gradient", "fp32"),
        ("full_gradient", None),
    ],
)
def test_a_refusal_comes_before_any_gradient_changes(
    kernel: str, basis: str | None, exists: bool, launches: Launches, pairs: tuple[list[Tensor], list[Anchor]]
) -> None:
    weights, anchors = pairs
    for weight in weights:
        weight.grad = torch.ones_like(weight) if exists else None
    launches.kernel, launches.basis = kernel, basis
    for _ in range(2):
        with pytest.raises(ValueError, match=WRONG):
            accumulate_rotation_grad_(weights, anchors, 0.5)
        assert launches.started == []
        for weight in weights:
            assert (weight.grad is not None) == exists
            assert weight.grad is None or weight.grad.eq(1).all()


def test_nothing_is_prepared_twice(launches: Launches, pairs: tuple[list[Tensor], list[Anchor]]) -> None:
    weights, anchors = pairs
    accumulate_rotation_grad_(weights, anchors, 0.5)
    asked = sorted(launches.prepared)
    assert asked == sorted(launches.started)
    assert {"project", "drift", "squares", "pull", "gradient", "full_drift", "full_gradient"} == set(asked)
    # Existing gradients take other kernels; the third call needs nothing new.
    for new in (True, False):
        launches.prepared.clear()
        launches.started.clear()
        accumulate_rotation_grad_(weights, anchors, 0.5)
        assert bool(launches.prepared) == new
        assert sorted(launches.started) == asked


@pytest.mark.parametrize("tensor", ["weight", "gradient"])
def test_another_layout_is_prepared_anew(tensor: str, launches: Launches) -> None:
    """It takes other kernels."""
    weight, anchor = anchored((24, 40), torch.bfloat16, torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    launches.prepared.clear()
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    assert launches.prepared == []
    if tensor == "weight":
        weight = weight.detach().T.contiguous().T.requires_grad_()
        weight.grad = torch.ones_like(weight, memory_format=torch.contiguous_format)
    else:
        weight.grad = torch.ones(40, 24, dtype=weight.dtype).T
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    assert launches.prepared


@pytest.mark.parametrize(
    ("kernel", "basis"),
    [("project", "bf16"), ("gradient", "bf16"), ("gradient", "fp32"), ("pull", "fp32"), ("full_gradient", None)],
)
def test_r_is_refused_before_its_backward_pass(
    kernel: str, basis: str | None, launches: Launches, pairs: tuple[list[Tensor], list[Anchor]]
) -> None:
    """If the backward pass of a loss refused, other gradients would have changed by then."""
    weights, anchors = pairs
    launches.kernel, launches.basis = kernel, basis
    with pytest.raises(ValueError, match=WRONG):
        rotation_penalty(weights, anchors)
    assert launches.started == []
    # Without gradients, no code of the backward pass is needed.
    with torch.no_grad():
        if kernel == "project":
            with pytest.raises(ValueError, match=WRONG):
                rotation_penalty(weights, anchors)
        else:
            rotation_penalty(weights, anchors)
    frozen = [weight.detach() for weight in weights]
    if kernel != "project":
        rotation_penalty(frozen, anchors)
