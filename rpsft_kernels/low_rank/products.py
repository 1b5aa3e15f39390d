"""The two products with U and V, of many factors in one call: images of factors, and gradients from coefficients.

All that a step reads and that is large goes through these two functions. They are bound by memory: r flops for each
number of U and V that is read, which is why a basis in bfloat16 is widened a few rows at a time, in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .. import ops

# Elements of a basis that are widened at a time: 1 MiB in float32 stays in a core's cache.
_CPU_ELEMENTS = 1 << 18
# On a GPU a launch costs more than the memory of a temporary.
_GPU_ELEMENTS = 1 << 24


def project_factors(factors: Sequence[Tensor], bases: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Compute the images ``F V`` (r, k) of factors F (r, n) in the bases V (n, k), summed in ``dtype``.

    Args:
        factors: F, any floating dtype and strides; r may be 0, and so may n.
        bases: V, on their factors' devices.
        dtype: float32 or float64.
    """
    images = []
    for factor, basis in zip(factors, bases, strict=True):
        image = torch.zeros((factor.shape[0], basis.shape[1]), dtype=dtype, device=factor.device)
        if factor.numel():
            wide = factor.to(dtype)
            for rows, chunk in _widen(basis, dtype):
                image.addmm_(wide[:, rows], chunk)
        images.append(image)
    return images


def add_products_(
    grads: Sequence[Tensor], coefficients: Sequence[Tensor], bases: Sequence[Tensor], accumulate: Sequence[bool]
) -> None:
    """Add ``X V^T`` (r, n) to each gradient, or write it over where ``accumulate`` is False.

    Args:
        grads: G (r, n), any floating dtype and strides. One of another dtype than the sums' is rounded once.
        coefficients: X (r, k), float32 or float64: the dtype of the sums.
        bases: V (n, k).
        accumulate: one for each gradient.
    """
    for grad, coefficient, basis, keep in zip(grads, coefficients, bases, accumulate, strict=True):
        for rows, chunk in _widen(basis, coefficient.dtype):
            target = grad[:, rows]
            if target.dtype == coefficient.dtype:
                target.addmm_(coefficient, chunk.T, beta=int(keep))
            else:
                with ops.without_autocast(grad.device):
                    product = coefficient @ chunk.T
                target.copy_(product.add_(target) if keep else product)


def _widen(basis: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield ranges of rows of V, and these rows in ``dtype``."""
    if basis.dtype == dtype:
        yield slice(None), basis
        return
    limit = _CPU_ELEMENTS if basis.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, limit // basis.shape[1])
    for first in range(0, basis.shape[0], step):
        rows = slice(first, first + step)
        yield rows, basis[rows].to(dtype)
