"""Products of factors grouped over the layers of a plan, on the kernels, against float64 and the plain products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rpsft_kernels import ops
from rpsft_kernels.anchors.tensors import pad_rows
from rpsft_kernels.low_rank import GroupedProducts
from rpsft_kernels.ops.triton.launch import watch_launches
from rpsft_kernels.ops.triton.variants import Variant
from support import relative_error

SHAPES = ((4, 40), (4, 72), (4, 40), (6, 56))
RANK = 24


class Kernels:
    """The names of the kernels that were launched, in order."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_launch(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        self.names.append(variant.kernel)

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        raise error


def make(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    factors = [torch.randn(r, n, device=device).to(dtype) for r, n in SHAPES]
    bases = [pad_rows((torch.randn(n, RANK, device=device) / n**0.5).to(torch.bfloat16)) for _, n in SHAPES]
    return factors, bases


def test_factors_of_one_rank_share_a_launch(device: torch.device) -> None:
    factors, bases = make(device)
    products, launched = GroupedProducts(), Kernels()
    with ops.use_backend("triton"), watch_launches(launched):
        images = products.project(factors, bases, torch.float32)
        again = products.project(factors, bases, torch.float32)
    assert [name.removeprefix("hopper_") for name in launched.names] == ["project"] * 4, "for r = 4 and r = 6, twice"
    for factor, basis, image, repeated in zip(factors, bases, images, again, strict=True):
        assert relative_error(image, factor.double() @ basis.double()) < 1e-6
        assert torch.equal(image, repeated)


def test_gradients_are_added_to_or_written(device: torch.device) -> None:
    """The second and the third are one and the same, of a factor that two layers share: written, then added to."""
    _, bases = make(device)
    bases[2] = bases[1]
    shared = torch.full((4, 72), float("nan"), device=device)
    grads = [torch.ones(4, 40, device=device), shared, shared, torch.ones(6, 56, device=device)]
    coefficients = [torch.randn(grad.shape[0], RANK, device=device) for grad in grads]
    with ops.use_backend("triton"):
        GroupedProducts().add_(grads, coefficients, bases, (True, False, True, True))
    exact = [x.double() @ basis.double().T for x, basis in zip(coefficients, bases, strict=True)]
    # X is rounded to bfloat16 once.
    assert relative_error(grads[0] - 1, exact[0]) < 2.0**-8
    assert relative_error(shared, exact[1] + exact[2]) < 2.0**-8
    assert relative_error(grads[3] - 1, exact[3]) < 2.0**-8


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_what_the_kernels_do_not_serve_is_computed_all_the_same(device: torch.device, dtype: torch.dtype) -> None:
    """In float64, empty, or recorded by autograd."""
    factors, bases = make(device, dtype)
    factors[1], bases[1] = factors[1][:0], bases[1]
    factors[3].requires_grad_(dtype == torch.float32)
    backend = "triton" if dtype == torch.float32 else "torch"
    with ops.use_backend(backend):
        images = GroupedProducts().project(factors, bases, dtype)
    assert images[1].shape == (0, RANK)
    for factor, basis, image in zip(factors, bases, images, strict=True):
        assert float((image.detach().double() - factor.double() @ basis.double()).norm()) <= 1e-5
    if dtype == torch.float32:
        (grad,) = torch.autograd.grad(images[3].sum(), factors[3])
        assert relative_error(grad, bases[3].double().sum(1).expand(6, 56)) < 1e-5
