"""Random subspaces in place of singular ones: a control that tells what the choice of directions does."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from .. import ops
from .subspace import captured_energy


def random_subspaces(weight: Tensor, rank: int, seed: int, name: str) -> tuple[Tensor, Tensor, float]:
    """Draw orthonormal U and V uniformly at random, and measure the share of W0's energy between them.

    They depend on shape, ``rank``, ``seed`` and ``name`` alone, not on the values of the weight, where it lies, or how
    many processes have it.

    Args:
        weight: W0, shape (m, n), finite, any floating point dtype and strides.
        rank: k, between 1 and min(m, n).
        seed: another one gives other subspaces.
        name: the weight's, so that weights of one shape get different ones.

    Returns:
        U, shape (m, k), and V, shape (n, k), in float64, on the weight's device where it has float64, and
        ``||U^T W0 V||_F^2 / ||W0||_F^2``.
    """
    device = weight.device if ops.has_float64(weight.device) else torch.device("cpu")
    left, right = (
        _random_basis(rows, rank, f"{seed} {side} {name}").to(device)
        for rows, side in zip(weight.shape, ("left", "right"), strict=True)
    )
    return left, right, captured_energy(weight, left, right)


def _random_basis(rows: int, rank: int, key: str) -> Tensor:
    """Draw (rows, rank) orthonormal columns in float64, on the CPU, whose span is uniformly distributed."""
    digest = hashlib.sha256(key.encode()).digest()
    # The generators of torch give other numbers on other processors.
    generator = np.random.default_rng(np.frombuffer(digest, dtype=np.uint32))
    drawn = torch.from_numpy(generator.standard_normal((rows, rank)))
    # With a positive diagonal the QR factorisation is unique, whichever way it is computed.
    basis: Tensor
    if 4 * rank <= 3 * rows:
        # Such a random matrix has a condition number of at most about 14, which squares to nothing in float64.
        triangle = torch.linalg.cholesky(drawn.T @ drawn, upper=True)
        basis = torch.linalg.solve_triangular(triangle, drawn, upper=True, left=False)
        return basis
    basis, triangle = torch.linalg.qr(drawn)
    return basis.mul_(torch.where(triangle.diagonal() < 0, -1.0, 1.0))
