"""Transforms of torch.func, batches of gradients and nested tensors are refused with the way out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from support import exact_gradient, random_matrix

DIFFERENTIATED = "got a tensor that torch.func.grad, or another transform of its kind, differentiates"
BATCHED = "got a batch of torch.func.vmap"


def _anchored() -> tuple[Tensor, rk.Anchor]:
    pretrained = random_matrix(24, 40)
    return pretrained + 0.1 * random_matrix(24, 40, seed=1), rk.Anchor.from_weight(pretrained, 4)


TRANSFORMS: dict[str, tuple[Callable[[Callable[..., Tensor], Tensor], object], str]] = {
    "grad": (lambda f, w: torch.func.grad(f)(w), DIFFERENTIATED),
    "vjp": (lambda f, w: torch.func.vjp(f, w), DIFFERENTIATED),
    "jacrev": (lambda f, w: torch.func.jacrev(f)(w), DIFFERENTIATED),
    "vmap": (lambda f, w: torch.func.vmap(f)(torch.stack([w, w])), BATCHED),
    "vmap of grad": (lambda f, w: torch.func.vmap(torch.func.grad(f))(torch.stack([w, w])), DIFFERENTIATED),
}


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform: str, planned: bool, backend: str) -> None:
    weight, anchor = _anchored()
    if planned:
        rk.rotation_penalty([weight], [anchor])
    apply, message = TRANSFORMS[transform]
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        r"weights\[0\]": lambda w: rk.rotation_penalty([w], [anchor]),
        # It returned a gradient of zeros, and added to a gradient that nobody has.
        "weights": lambda w: rk.accumulate_rotation_grad_(w, anchor, 1.0),
        "weight": lambda w: rk.project(w, anchor.left, anchor.right, anchor.base).sum(),  # type: ignore[arg-type]
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"^{name}: {message}"):
            apply(call, weight)
    # A weight that no transform has touched may be used within one.
    torch.func.grad(lambda x: x.sum() + rk.rotation_penalty(weight, anchor))(torch.ones(3))


@pytest.mark.parametrize("project", [False, True])
def test_batches_of_gradients_are_refused(project: bool, backend: str) -> None:
    weight, anchor = _anchored()
    weight.requires_grad_()
    if project:
        value = rk.project(weight, anchor.left, anchor.right, anchor.base).square().sum()  # type: ignore[arg-type]
    else:
        value = rk.rotation_penalty(weight, anchor)
    with pytest.raises(ValueError, match="^grad_outputs: got a batch of gradients for one backward pass"):
        torch.autograd.grad(value, weight, torch.ones(2), is_grads_batched=True)


def test_the_way_out_of_the_message(backend: str) -> None:
    weight, anchor = _anchored()
    exact = exact_gradient(weight, anchor)
    found = torch.autograd.functional.jacobian(lambda w: rk.rotation_penalty(w, anchor), weight)  # type: ignore[no-untyped-call]
    assert float((found - exact).norm() / exact.norm()) < 0.02


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_refused(layout: torch.layout) -> None:
    weight, anchor = _anchored()
    nested = torch.nested.nested_tensor([weight, weight], layout=layout)
    message = r"got a nested tensor, expected a dense matrix; pass its parts as a list: "
    with pytest.raises(ValueError, match=rf"^weights: {message}weights\.unbind\(\)"):
        rk.rotation_penalty(nested, anchor)
    with pytest.raises(ValueError, match=rf"^weight: {message}"):
        rk.project(nested, anchor.left, anchor.right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"^weight: {message}"):
        rk.Anchor.from_weight(nested, 4)
    assert rk.rotation_penalty(list(nested.unbind()), [anchor, anchor]) > 0
