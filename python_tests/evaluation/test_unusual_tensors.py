"""Weights and gradients whose memory does not hold their values, or not where kernels would read them."""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor

import rpsft_kernels as rk
from plan_ranks import redistributed_gradients
from plans import forget
from ranks import run_ranks
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.distributed.weight import LocalWeight
from rpsft_kernels.evaluation import pairing
from rpsft_kernels.ops.triton import launch
from support import random_matrix


def _anchored() -> tuple[Tensor, rk.Anchor]:
    pretrained = random_matrix(24, 40, torch.float32)
    return pretrained + 0.1 * random_matrix(24, 40, torch.float32, seed=1), rk.Anchor.from_weight(pretrained, 4)


def test_a_subclass_without_memory_does_not_find_the_plan_of_a_tensor_with_some(backend: str) -> None:
    weight, anchor = _anchored()
    expected = rk.rotation_penalty([weight], [anchor])
    found = rk.rotation_penalty([TwoTensor(weight.clone(), weight.clone())], [anchor])
    assert found.a == expected and found.b == expected  # type: ignore[attr-defined]


def test_a_view_of_the_negative_is_read_by_its_values(backend: str) -> None:
    weight, anchor = _anchored()
    expected = rk.rotation_penalty([weight], [anchor])
    view = torch._neg_view(-weight)
    assert view.is_neg()
    torch.testing.assert_close(rk.rotation_penalty([view], [anchor]), expected)


def test_gradients_of_another_shape_or_of_the_negative_are_refused(backend: str) -> None:
    weight, anchor = _anchored()
    parameter = torch.nn.Parameter(random_matrix(30, 40, torch.float32))
    parameter.grad = torch.zeros(30, 40)
    parameter.data = weight
    with pytest.raises(ValueError, match=r"weights\[0\]\.grad: got shape \(30, 40\) on cpu, expected \(24, 40\)"):
        rk.accumulate_rotation_grad_([parameter], [anchor], 1.0)
    parameter.grad = torch._neg_view(torch.ones(24, 40))
    with pytest.raises(ValueError, match=r"weights\[0\]\.grad: got a view that stands .* resolve it"):
        rk.accumulate_rotation_grad_([parameter], [anchor], 1.0)
    parameter.grad = parameter.grad.resolve_neg()
    rk.accumulate_rotation_grad_([parameter], [anchor], 1.0)


@dataclass(frozen=True)
class _Copying(LocalWeight):
    """A weight whose gradient is reached as DeepSpeed ZeRO-3's is."""

    @property
    def lasting(self) -> bool:
        return False

    @property
    def copies_gradient(self) -> bool:
        return True

    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.parameter.grad.clone()

    def write_back(self, gradient: Tensor) -> None:
        self.parameter.grad = gradient


def test_a_weight_listed_twice_whose_gradient_is_copied(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, anchor = _anchored()
    other = rk.Anchor.from_weight(random_matrix(24, 40, torch.float32, seed=2), 4)
    plain, copied = (torch.nn.Parameter(weight.clone()) for _ in range(2))
    plain.grad, copied.grad = torch.ones(24, 40), torch.ones(24, 40)
    expected = rk.accumulate_rotation_grad_([plain, plain], [anchor, other], 0.5)

    def locate(tensor: Tensor, name: str) -> LocalWeight:
        return _Copying(tensor, (24, 40), Shard.whole((24, 40)))

    monkeypatch.setattr(pairing, "locate_tensor", locate)
    for _ in range(2):
        copied.grad = torch.ones(24, 40)
        assert rk.accumulate_rotation_grad_([copied, copied], [anchor, other], 0.5) == expected
        assert torch.equal(copied.grad, plain.grad)


def test_gradients_that_are_still_being_redistributed() -> None:
    for error in run_ranks(2, redistributed_gradients):
        assert error == 0


def test_inference_mode_first_and_training_after(backend: str) -> None:
    weight, anchor = _anchored()
    parameter = torch.nn.Parameter(weight)
    with torch.inference_mode():
        expected = rk.rotation_penalty([parameter], [anchor]).item()
    assert rk.accumulate_rotation_grad_([parameter], [anchor], 1.0).item() == expected
    rk.rotation_penalty([parameter], [anchor]).backward()
    assert rk.rotation_penalty([parameter], [anchor]).item() == expected


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="takes TRITON_INTERPRET=1, set before the start")
def test_a_refusal_holds_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, anchor = _anchored()
    parameter = torch.nn.Parameter(weight)
    made: list[weakref.ref[Tensor]] = []

    def refuse(variant: object, *_: object) -> None:
        assert parameter.grad is not None
        made.append(weakref.ref(parameter.grad))
        raise ValueError("no")

    forget()
    monkeypatch.setattr(launch, "find_start", refuse)
    gc.disable()
    try:
        with rk.use_backend("triton"), pytest.raises(ValueError, match="no"):
            rk.accumulate_rotation_grad_([parameter], [anchor], 1.0)
        assert parameter.grad is None and made and made[0]() is None
    finally:
        gc.enable()
        forget()


def test_fake_gradients_have_no_memory_that_could_overlap() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    anchors = [rk.Anchor.from_weight(random_matrix(8, 6, seed=seed), 3) for seed in range(2)]
    with FakeTensorMode(allow_non_fake_inputs=True), warnings.catch_warnings():
        # What torch says of addresses of fake tensors.
        warnings.simplefilter("ignore")
        weights = [torch.nn.Parameter(torch.empty(8, 6)) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.empty(8, 6)
        with rk.use_backend("torch"):
            assert rk.accumulate_rotation_grad_(weights, anchors, 1.0).shape == ()
