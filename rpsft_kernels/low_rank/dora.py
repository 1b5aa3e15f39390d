"""DoRA: weights ``diag(g) (W + s B A)`` with ``g = magnitude / ||rows of W + s B A||``, and the drift of their rows.

The norms are constants to autograd, as in PEFT's forward pass. They take one reading of W a step; of all other products
none has the size of the weight, but for the full form, which has no smaller one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .products import project_factors
from .start import AdapterStart

# Elements of W that are widened at a time: as in products.py.
_CPU_ELEMENTS = 1 << 18
_GPU_ELEMENTS = 1 << 24


class ScaledWeight(NamedTuple):
    """What a step needs of a weight with DoRA's adapter.

    Attributes:
        base: W (out, in), any floating dtype; may be a transposed view.
        up: B (out, r).
        down: A (r, in).
        magnitude: (out,).
        scaling: s.
        start: what the adapter was; None counts from W itself.
    """

    base: Tensor
    up: Tensor
    down: Tensor
    magnitude: Tensor
    scaling: float
    start: AdapterStart | None


class ScaledImages(NamedTuple):
    """The products of one step.

    Attributes:
        norms: of the rows (out,), constants.
        scale: g (out,).
        up: B (out, r) in the dtype of the sums.
        down_image: ``A V`` (r, k).
        rows: ``(W + s B A) V`` (out, k).
        drift: C (k, k); in the full form the drift of the weight itself.
    """

    norms: Tensor
    scale: Tensor
    up: Tensor
    down_image: Tensor
    rows: Tensor
    drift: Tensor


def square_rows(base: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the squared norms of the rows of W (out,), a constant of the training."""
    return torch.cat([chunk.square().sum(1) for _, chunk in _widen(base, dtype)])


def image_of_base(base: Tensor, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return ``W V`` (out, k), a constant of the training; W itself in the full form."""
    if basis is None:
        return base.to(dtype)
    wide = basis.to(dtype)
    with ops.without_autocast(base.device):
        return torch.cat([chunk @ wide for _, chunk in _widen(base, dtype)])


@torch.no_grad()
def norm_rows(weight: ScaledWeight, squares: Tensor) -> Tensor:
    """Return ``||rows of W + s B A||`` (out,) from ``squares``, those of W: ``||w||^2 + 2 s b.Aw + s^2 b AA^T b``."""
    dtype = squares.dtype
    up, down = weight.up.detach().to(dtype), weight.down.detach().to(dtype)
    s = weight.scaling
    with ops.without_autocast(weight.base.device):
        crossed = torch.cat([chunk @ down.T for _, chunk in _widen(weight.base, dtype)])
        return (squares + 2 * s * (up * crossed).sum(1) + s * s * ((up @ (down @ down.T)) * up).sum(1)).sqrt()


def scale_rows(weight: ScaledWeight, squares: Tensor) -> Tensor:
    """Return g (out,)."""
    return weight.magnitude.detach().to(squares.dtype) / norm_rows(weight, squares)


def project_scaled(
    weight: ScaledWeight, squares: Tensor, base_image: Tensor, up_basis: Tensor | None, down_basis: Tensor | None
) -> ScaledImages:
    """Compute the drift ``U^T (diag(g) (W + s B A) - diag(g0) (W + s B0 A0)) V``, exactly 0 at the start.

    It is ``diag(g - g0) (W + s B0 A0) + s diag(g) ((B - B0) A + B0 (A - A0))`` between the bases. Autograd may record
    it, but for the norms.

    Args:
        weight: the weight.
        squares: :func:`square_rows` of its base.
        base_image: :func:`image_of_base` of its base.
        up_basis: U (out, k); None in the full form.
        down_basis: V (in, k); None in the full form.
    """
    with ops.without_autocast(weight.base.device):
        dtype, s, start = squares.dtype, weight.scaling, weight.start
        norms = norm_rows(weight, squares)
        scale = weight.magnitude.to(dtype) / norms
        up, down = weight.up.to(dtype), weight.down.to(dtype)
        start_scale = 1.0 if start is None or start.scale is None else start.scale.to(dtype)
        moved = (scale - start_scale)[:, None]
        if start is not None and start.up is not None and start.down is not None:
            start_up, start_down = start.up.to(dtype), start.down.to(dtype)
            start_image, turned = (_image(factor, down_basis, dtype) for factor in (start_down, down - start_down))
            image = start_image + turned
            drift_rows = moved * (base_image + s * (start_up @ start_image))
            drift_rows = drift_rows + s * scale[:, None] * ((up - start_up) @ image + start_up @ turned)
        else:
            image = _image(down, down_basis, dtype)
            drift_rows = moved * base_image + s * scale[:, None] * (up @ image)
        drift = drift_rows if up_basis is None else _contract(up_basis, drift_rows)
        return ScaledImages(norms, scale, up, image, base_image + s * (up @ image), drift)


class ScaledGradients(NamedTuple):
    """Gradients of R times a factor: of B (out, r), of the magnitudes (out,), and ``down`` (r, k), which ``down V^T``
    makes the gradient of A.
    """

    up: Tensor
    magnitude: Tensor
    down: Tensor


def differentiate_scaled(
    images: ScaledImages, scaling: float, factor: float | Tensor, up_basis: Tensor | None
) -> ScaledGradients:
    """Return the gradients of ``factor * ||C||^2``."""
    with ops.without_autocast(images.drift.device):
        pulled = images.drift if up_basis is None else _expand(up_basis, images.drift)
        twice = 2 * factor
        scaled_up = images.scale[:, None] * images.up
        return ScaledGradients(
            up=(twice * scaling) * images.scale[:, None] * (pulled @ images.down_image.T),
            magnitude=twice * (pulled * images.rows).sum(1) / images.norms,
            down=(twice * scaling) * (scaled_up.T @ pulled),
        )


def _image(factor: Tensor, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    return factor if basis is None else project_factors([factor], [basis], dtype)[0]


def _contract(basis: Tensor, rows: Tensor) -> Tensor:
    """Return ``U^T H`` (k, k)."""
    return project_factors([rows.T], [basis], rows.dtype)[0].T


def _expand(basis: Tensor, drift: Tensor) -> Tensor:
    """Return ``U C`` (out, k)."""
    return torch.cat([chunk @ drift for _, chunk in _widen(basis, drift.dtype)])


def _widen(matrix: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    limit = _CPU_ELEMENTS if matrix.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, limit // matrix.shape[1])
    for first in range(0, matrix.shape[0], step):
        rows = slice(first, first + step)
        yield rows, matrix[rows].to(dtype)
