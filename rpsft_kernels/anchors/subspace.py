"""Top singular subspaces of a weight: the U and V of RPSFT's drift U^T (W - W0) V (arXiv 2605.10973)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# 64 MiB in float64: long enough for a fast matrix product, small beside any weight that needs cutting.
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Top-k singular subspaces of an (m, n) weight, all in float64 on the weight's device.

    Attributes:
        left: Shape (m, k), orthonormal columns U.
        values: Shape (k,), the singular values, largest first, never negative.
        right: Shape (n, k), orthonormal columns V.
        energy: Share of ||W||_F^2 that lies in the k directions, in [0, 1]; 1.0 for a zero matrix.
    """

    left: Tensor
    values: Tensor
    right: Tensor
    energy: float


def top_subspaces(weight: Tensor, rank: int) -> Subspaces:
    """Compute the exact top-``rank`` singular subspaces of ``weight``.

    The float64 Gram matrix of the shorter side is diagonalised; the longer side follows from a QR
    factorisation of W V_k, so U and V are orthonormal to float64 even where singular values vanish,
    and U^T W V has a non-negative diagonal. The Gram matrix is summed over chunks: no float64 copy of the
    weight is ever held, only (m + n) k and min(m, n)^2 elements. Directions whose singular value is below
    about 1e-8 of the largest are null to this method: an arbitrary orthonormal completion.

    Args:
        weight: Shape (m, n), any floating point dtype and strides.
        rank: k, between 1 and min(m, n).

    Raises:
        ValueError: ``weight`` is not a non-empty finite floating point matrix, or ``rank`` is out of range.
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} and {weight.dtype}, expected a non-empty 2-D floating "
            "point tensor; reshape it to (rows, columns) first"
        )
    shorter = min(weight.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= shorter:
        raise ValueError(f"rank: got {rank!r}, expected an int between 1 and min{tuple(weight.shape)} = {shorter}")

    with torch.no_grad():
        weight = weight.detach()
        wide = weight.shape[0] < weight.shape[1]
        tall = weight.T if wide else weight
        scale = _scale(tall)
        gram = _gram(tall, scale)
        eigenvalues, eigenvectors = torch.linalg.eigh(gram)
        short_basis = eigenvectors[:, -rank:].flip(1)

        image = _multiply(tall, short_basis, scale)
        long_basis, triangle = torch.linalg.qr(image)
        diagonal = triangle.diagonal()
        long_basis *= torch.where(diagonal < 0, -1.0, 1.0)

        # Squaring costs the Gram matrix half the digits of a small singular value; |R_ii| still has them,
        # and only among those can its order differ from that of the eigenvalues.
        values, order = diagonal.abs().sort(descending=True, stable=True)
        long_basis, short_basis = long_basis[:, order], short_basis[:, order]

        total = float(gram.trace())
        captured = float(eigenvalues[-rank:].clamp(min=0).sum())
        energy = min(1.0, captured / total) if total > 0 else 1.0

    left, right = (short_basis, long_basis) if wide else (long_basis, short_basis)
    return Subspaces(left=left, values=values / scale, right=right, energy=energy)


def _scale(weight: Tensor) -> float:
    """Find a power of two that brings the largest entry near 1, so that squares of float64 entries stay in range."""
    low, high = torch.aminmax(weight)
    largest = max(abs(float(low)), abs(float(high)))
    if math.isnan(float(low)) or not math.isfinite(largest):
        raise ValueError("weight: got NaN or infinity, expected finite values only; check where it was loaded from")
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    return 2.0 ** -max(-1000, min(1000, exponent))


def _chunk_rows(tall: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // tall.shape[1])


def _gram(tall: Tensor, scale: float) -> Tensor:
    columns = tall.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=tall.device)
    for chunk in torch.split(tall, _chunk_rows(tall)):
        rows = chunk.to(torch.float64) * scale
        gram.addmm_(rows.T, rows)
    return gram


def _multiply(tall: Tensor, basis: Tensor, scale: float) -> Tensor:
    image = torch.empty(tall.shape[0], basis.shape[1], dtype=torch.float64, device=tall.device)
    step = _chunk_rows(tall)
    for chunk, out in zip(torch.split(tall, step), torch.split(image, step), strict=True):
        torch.mm(chunk.to(torch.float64) * scale, basis, out=out)
    return image
