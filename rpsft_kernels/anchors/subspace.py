"""Top singular subspaces of a weight: the U and V of RPSFT's drift U^T (W - W0) V (arXiv 2605.10973)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..checks import read_rank

# 64 MiB in float64: long enough for a fast matrix product, small beside any weight that needs cutting.
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True, eq=False)
class Subspaces:
    """Top-k singular subspaces of an (m, n) weight, all in float64, on the weight's device where it has float64.

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

    def to(self, device: torch.device) -> Subspaces:
        return Subspaces(self.left.to(device), self.values.to(device), self.right.to(device), self.energy)


def top_subspaces(weight: Tensor, rank: int) -> Subspaces:
    """Compute the exact top-``rank`` singular subspaces of ``weight``.

    The float64 Gram matrix of the shorter side is diagonalised; the longer side follows from a QR
    factorisation of W V_k, so U and V are orthonormal to float64 even where singular values vanish,
    and U^T W V has a non-negative diagonal. The Gram matrix is summed over chunks: no float64 copy of the
    weight is ever held, only (m + n) k and min(m, n)^2 elements. Directions whose singular value is below
    about 1e-8 of the largest are null to this method: an arbitrary orthonormal completion.

    On a device without float64 (MPS, some XPUs) it is computed on the CPU, and stays there. Where a device's library
    fails, the CPU is tried, and where LAPACK's eigenvalue solver does, its singular value solver; each with a warning.

    Args:
        weight: Shape (m, n), any floating point dtype and strides.
        rank: k, between 1 and min(m, n).

    Raises:
        ValueError: ``weight`` is not a non-empty finite floating point matrix, or ``rank`` is out of range.
        RuntimeError: every way has failed; the message says how.
    """
    _check_matrix(weight)
    shorter = min(weight.shape)
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= shorter:
        raise ValueError(f"rank: got {rank!r}, expected an int between 1 and min{tuple(weight.shape)} = {shorter}")
    spaces = _find(weight, rank)
    assert spaces is not None
    return spaces


def subspaces_of_share(weight: Tensor, share: float) -> Subspaces | None:
    """Compute the smallest top singular subspaces that hold ``share`` of ||W||_F^2.

    They have the bits of :func:`top_subspaces` at that rank, and its errors.

    Args:
        weight: Shape (m, n), any floating point dtype and strides.
        share: strictly between 0 and 1.

    Returns:
        None where it takes all min(m, n) directions.
    """
    _check_matrix(weight)
    if not isinstance(read_rank(share), float):
        raise ValueError(f"share: got {share!r}, expected a float strictly between 0 and 1")
    return _find(weight, float(share))


def largest_rank(shape: tuple[int, ...], share: float) -> int:
    """Return the largest k that ``share`` of the energy of any weight (m, n) can take; at most min(m, n).

    The top k of r directions never hold less than k / r of the energy, and exactly that where all r singular values are
    equal. One more than that is allowed for where rounding decides.
    """
    shorter = min(shape)
    return min(shorter, math.floor(share * shorter + 1e-6) + 1)


def captured_energy(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """Compute ``||U^T W V||_F^2 / ||W||_F^2`` in float64, in [0, 1]; 1.0 for a zero matrix.

    Args:
        weight: Shape (m, n), finite, any floating point dtype and strides.
        left: U, shape (m, k), orthonormal columns in float64, on the device to compute on.
        right: V, shape (n, k), likewise.
    """
    with torch.no_grad():
        weight = weight.detach()
        scale = _scale(weight)
        tall = weight.T if weight.shape[0] < weight.shape[1] else weight
        long_basis, short_basis = (left, right) if tall is weight else (right, left)
        block = torch.zeros(left.shape[1], left.shape[1], dtype=torch.float64, device=left.device)
        total = torch.zeros((), dtype=torch.float64, device=left.device)
        step = _chunk_rows(tall)
        for chunk, basis in zip(torch.split(tall, step), torch.split(long_basis, step), strict=True):
            rows = _widen(chunk, left.device) * scale
            total += rows.square().sum()
            block.addmm_(basis.T, rows @ short_basis)
        return min(1.0, float(block.square().sum() / total)) if total > 0 else 1.0


def _check_matrix(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got shape {tuple(weight.shape)} and {weight.dtype}, expected a non-empty 2-D floating "
            "point tensor; reshape it to (rows, columns) first"
        )


def _find(weight: Tensor, rank: int | float) -> Subspaces | None:
    """Try every way to compute the subspaces; None where a share of energy takes all directions."""
    with torch.no_grad():
        weight = weight.detach()
        scale = _scale(weight)
        failures: list[str] = []
        attempts = _attempts(weight.device)
        for i, (name, device, diagonalise) in enumerate(attempts):
            try:
                spaces = _compute(weight, rank, scale, device, diagonalise)
            except (RuntimeError, TypeError) as error:
                failures.append(f"{name}: {type(error).__name__}: {str(error).strip()}")
                if i + 1 < len(attempts):
                    warnings.warn(
                        f"the singular subspaces of a weight of shape {tuple(weight.shape)} were not found by "
                        f"{failures[-1]}; {attempts[i + 1][0]} is tried",
                        UserWarning,
                        stacklevel=3,
                    )
                continue
            if spaces is None or not ops.has_float64(weight.device):
                return spaces
            return spaces.to(weight.device)
    raise RuntimeError(
        f"weight: its singular subspaces were not found: {'; '.join(failures)}; free memory if that is what "
        "is missing, or leave the weight out (exclude=...)"
    )


Diagonalise = Callable[[Tensor], tuple[Tensor, Tensor]]


def _attempts(device: torch.device) -> list[tuple[str, torch.device, Diagonalise]]:
    """List the ways to compute subspaces, in order: a name, the device, and the solver of a symmetric matrix."""
    cpu = torch.device("cpu")
    attempts: list[tuple[str, torch.device, Diagonalise]] = [
        ("torch.linalg.eigh on the CPU", cpu, _solve_eigenvalues),
        ("torch.linalg.svd on the CPU", cpu, _solve_singular_values),
    ]
    if device.type != "cpu" and ops.has_float64(device):
        attempts.insert(0, (f"torch.linalg.eigh on {device}", device, _solve_eigenvalues))
    return attempts


def _solve_eigenvalues(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues of a symmetric matrix in ascending order, and the eigenvectors in columns."""
    eigenvalues, eigenvectors = torch.linalg.eigh(gram)
    return eigenvalues, eigenvectors


def _solve_singular_values(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same for a positive semidefinite matrix, whose singular values and vectors are these."""
    vectors, values, _ = torch.linalg.svd(gram)
    return values.flip(0), vectors.flip(1)


def _compute(
    weight: Tensor, rank: int | float, scale: float, device: torch.device, diagonalise: Diagonalise
) -> Subspaces | None:
    wide = weight.shape[0] < weight.shape[1]
    tall = weight.T if wide else weight
    gram = _gram(tall, scale, device)
    eigenvalues, eigenvectors = diagonalise(gram)
    total = float(gram.trace())
    if isinstance(rank, float):
        rank = _count_directions(eigenvalues, total, rank)
        if rank == min(weight.shape):
            return None
    short_basis = eigenvectors[:, -rank:].flip(1)

    image = _multiply(tall, short_basis, scale)
    long_basis, triangle = torch.linalg.qr(image)
    diagonal = triangle.diagonal()
    long_basis *= torch.where(diagonal < 0, -1.0, 1.0)

    # Squaring costs the Gram matrix half the digits of a small singular value; |R_ii| still has them,
    # and only among those can its order differ from that of the eigenvalues.
    values, order = diagonal.abs().sort(descending=True, stable=True)
    long_basis, short_basis = long_basis[:, order], short_basis[:, order]

    energy = _energy(eigenvalues, rank, total)
    if not math.isfinite(energy) or not bool(values.isfinite().all()):
        raise RuntimeError("got NaN or infinity")

    left, right = (short_basis, long_basis) if wide else (long_basis, short_basis)
    return Subspaces(left=left, values=values / scale, right=right, energy=energy)


def _energy(eigenvalues: Tensor, rank: int, total: float) -> float:
    """Return the share of ``total`` in the last ``rank`` eigenvalues."""
    captured = float(eigenvalues[-rank:].clamp(min=0).sum())
    if not math.isfinite(captured):
        return captured
    return min(1.0, captured / total) if total > 0 else 1.0


def _count_directions(eigenvalues: Tensor, total: float, share: float) -> int:
    """Return the smallest rank whose energy, as :func:`_energy` rounds it, reaches ``share``; else all."""
    if not bool(eigenvalues.isfinite().all()):
        raise RuntimeError("got NaN or infinity")
    sums = eigenvalues.flip(0).clamp(min=0).cumsum(0)
    rank = min(len(eigenvalues), 1 + int((sums < share * total).sum()))
    # The sums above are rounded in another order.
    while rank < len(eigenvalues) and _energy(eigenvalues, rank, total) < share:
        rank += 1
    while rank > 1 and _energy(eigenvalues, rank - 1, total) >= share:
        rank -= 1
    return rank


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


def _gram(tall: Tensor, scale: float, device: torch.device) -> Tensor:
    columns = tall.shape[1]
    gram = torch.zeros(columns, columns, dtype=torch.float64, device=device)
    for chunk in torch.split(tall, _chunk_rows(tall)):
        rows = _widen(chunk, device) * scale
        gram.addmm_(rows.T, rows)
    return gram


def _multiply(tall: Tensor, basis: Tensor, scale: float) -> Tensor:
    image = torch.empty(tall.shape[0], basis.shape[1], dtype=torch.float64, device=basis.device)
    step = _chunk_rows(tall)
    for chunk, out in zip(torch.split(tall, step), torch.split(image, step), strict=True):
        torch.mm(_widen(chunk, basis.device) * scale, basis, out=out)
    return image


def _widen(chunk: Tensor, device: torch.device) -> Tensor:
    # First to the device: the one that it comes from may lack float64.
    return chunk.to(device).to(torch.float64)
