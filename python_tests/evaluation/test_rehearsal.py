"""What has no code that may run is found out before anything has changed.

On the CPU, with interpreted kernels: that a launch may be refused, and which one, is made up.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels import Anchor, accumulate_rotation_grad_, rotation_penalty, use_backend
from rpsft_kernels.evaluation import accumulation
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
    """Stands before every launch: refuses one kernel of one dtype, and counts the others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kernel = ""
        self.basis: str | None = None
        self.rehearsed: list[str] = []
        self.started: list[str] = []
        start = launch._start

        def refuse(variant: Variant, log: list[str]) -> None:
            log.append(variant.kernel)
            if variant.kernel == self.kernel and dict(variant.constants).get("BASIS_TYPE") == self.basis:
                raise ValueError(WRONG)

        def rehearse(variant: Variant, device: torch.device, arguments: tuple[Tensor, ...]) -> None:
            refuse(variant, self.rehearsed)

        def checked(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> None:
            refuse(variant, self.started)
            start(variant, programs, device, arguments)

        monkeypatch.setattr(launch, "_rehearse", rehearse)
        monkeypatch.setattr(launch, "_start", checked)
        monkeypatch.setattr(accumulation.ops, "may_refuse", lambda _: True)
        monkeypatch.setattr(accumulation, "_rehearsed", set())


def noted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Labels of the variants that are rehearsed and started from now on."""
    labels: dict[str, list[str]] = {"_rehearse": [], "_start": []}
    for name, seen in labels.items():
        before = getattr(launch, name)

        def note(variant: Variant, *rest: Any, seen: list[str] = seen, before: Any = before) -> None:
            seen.append(variant.label())
            before(variant, *rest)

        monkeypatch.setattr(launch, name, note)
    return labels


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    with use_backend("triton"):
        yield Launches(monkeypatch)


@pytest.fixture
def pairs() -> tuple[list[Tensor], list[Anchor]]:
    """Weights under a full anchor, bfloat16 bases and float32 bases: three buckets."""
    full = torch.randn(6, 5)
    first = full + 0.1
    anchor = Anchor(base=full, shape=(6, 5), weight_dtype=torch.float32, rank=5, energy=1.0)
    found = [(first.requires_grad_(), anchor)]
    found.append(anchored((24, 40), torch.bfloat16, torch.bfloat16))
    found.append(anchored((40, 24), torch.float32, torch.float32))
    return [weight for weight, _ in found], [anchor for _, anchor in found]


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    ("kernel", "basis"),
    [("project", "bf16"), ("project", "fp32"), ("drift", "fp32"), ("pull", "bf16"), ("gradient", "bf16"),
     ("gradient", "fp32"), ("full_gradient", None)],
)  # fmt: skip
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


def test_without_a_rehearsal_gradients_would_have_changed(
    launches: Launches, pairs: tuple[list[Tensor], list[Anchor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the test above tests something."""
    weights, anchors = pairs
    monkeypatch.setattr(accumulation.ops, "may_refuse", lambda _: False)
    launches.kernel, launches.basis = "gradient", "fp32"
    with pytest.raises(ValueError, match=WRONG):
        accumulate_rotation_grad_(weights, anchors, 0.5)
    assert any(weight.grad is not None for weight in weights)
    assert launches.rehearsed == []


def test_a_rehearsal_asks_for_what_is_launched_and_changes_nothing(
    launches: Launches, pairs: tuple[list[Tensor], list[Anchor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, anchors = pairs
    value = accumulate_rotation_grad_(weights, anchors, 0.5)
    asked = sorted(launches.rehearsed)
    assert asked == sorted(launches.started)
    assert {"project", "drift", "squares", "pull", "gradient", "full_drift", "full_gradient"} == set(asked)
    # Gradients exist now, which are other kernels; and then nothing is new.
    accumulate_rotation_grad_(weights, anchors, 0.5)
    assert sorted(launches.rehearsed) == sorted(asked * 2)
    accumulate_rotation_grad_(weights, anchors, 0.5)
    assert sorted(launches.rehearsed) == sorted(asked * 2)
    assert sorted(launches.started) == sorted(asked * 3)
    plain = [weight.detach().clone().requires_grad_() for weight in weights]
    monkeypatch.setattr(accumulation.ops, "may_refuse", lambda _: False)
    assert torch.equal(accumulate_rotation_grad_(plain, anchors, 0.5), value)
    for weight, other in zip(weights, plain, strict=True):
        assert weight.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(weight.grad, 3 * other.grad, rtol=2**-6, atol=2**-8)


@pytest.mark.parametrize("what", ["weight", "gradient"])
def test_what_lies_otherwise_is_rehearsed_anew(what: str, launches: Launches) -> None:
    """It is launched with other kernels."""
    weight, anchor = anchored((24, 40), torch.bfloat16, torch.bfloat16)
    weight.grad = torch.ones_like(weight)
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    assert launches.rehearsed
    launches.rehearsed.clear()
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    assert launches.rehearsed == []
    if what == "weight":
        weight = weight.detach().T.contiguous().T.requires_grad_()
        weight.grad = torch.ones_like(weight, memory_format=torch.contiguous_format)
    else:
        weight.grad = torch.ones(40, 24, dtype=weight.dtype).T
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    assert launches.rehearsed


def test_existing_gradients_are_rehearsed_as_they_lie(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = noted(monkeypatch)
    weight, anchor = anchored((24, 40), torch.bfloat16, torch.bfloat16)
    weight.grad = torch.ones(40, 24, dtype=weight.dtype).T
    accumulate_rotation_grad_([weight], [anchor], 0.5)
    assert sorted(labels["_rehearse"]) == sorted(labels["_start"])


@pytest.mark.parametrize("apart", [False, True])
def test_what_is_added_to_a_gradient_of_the_same_call_is_rehearsed_so(
    apart: bool, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight that is listed twice, in one bucket or in two: the second time its gradient is there."""
    weight, anchor = anchored((24, 40), torch.bfloat16, torch.bfloat16)
    other = anchor
    if apart:
        assert anchor.left is not None
        assert anchor.right is not None
        other = dataclasses.replace(anchor, left=anchor.left.float(), right=anchor.right.float())
    labels = noted(monkeypatch)
    accumulate_rotation_grad_([weight, weight], [anchor, other], 0.5)
    assert sorted(labels["_rehearse"]) == sorted(labels["_start"])


@pytest.mark.parametrize(
    ("kernel", "basis"),
    [("project", "bf16"), ("gradient", "bf16"), ("gradient", "fp32"), ("pull", "fp32"), ("full_gradient", None)],
)
def test_r_is_refused_before_its_backward_pass(
    kernel: str, basis: str | None, launches: Launches, pairs: tuple[list[Tensor], list[Anchor]]
) -> None:
    """In the backward pass of a loss other gradients would have changed."""
    weights, anchors = pairs
    launches.kernel, launches.basis = kernel, basis
    with pytest.raises(ValueError, match=WRONG):
        rotation_penalty(weights, anchors)
    assert launches.started == []
    # What no backward pass follows needs no code for it.
    with torch.no_grad():
        if kernel == "project":
            with pytest.raises(ValueError, match=WRONG):
                rotation_penalty(weights, anchors)
        else:
            rotation_penalty(weights, anchors)
    frozen = [weight.detach() for weight in weights]
    if kernel != "project":
        rotation_penalty(frozen, anchors)


def test_a_rehearsal_asks_for_what_the_backward_pass_launches(
    launches: Launches, pairs: tuple[list[Tensor], list[Anchor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, anchors = pairs
    weights[1] = weights[1].detach().T.contiguous().T.requires_grad_()
    labels = noted(monkeypatch)
    # Two of a bucket are launched together, and rehearsed one by one.
    weight, anchor = anchored((24, 40), torch.bfloat16, torch.bfloat16)
    rotation_penalty([*weights, weight], [*anchors, anchor]).backward()  # type: ignore[no-untyped-call]
    assert set(labels["_rehearse"]) == set(labels["_start"])
