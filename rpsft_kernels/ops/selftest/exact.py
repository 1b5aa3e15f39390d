"""The formulas in float64, and how far rounding may take a backend's numbers from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Problem

# Elements of a float64 temporary, where products are formed without a library.
_CHUNK = 1 << 24
# Allowed errors, in units of the size of what is summed (below). Where factors are rounded to bfloat16 (2^-9 each) that
# is some standard deviations more than the largest of a million shows. Else it is what sums in float32 may lose: tensor
# cores cut off what they add, so that errors of hundreds of steps do not cancel. It is above what a lost third bfloat16
# part makes (2^-18), which ``checks`` sees in the sums that are exact.
ROUNDED = 2.0**-5
WIDE = 2.0**-13


class Expected(NamedTuple):
    """Exact numbers, and per number the root of the sum of squares of the products that it is a sum of: independent
    relative errors of the factors grow to so much, and no more, wherever it lies.
    """

    values: Tensor
    size: Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b in float64."""
    if not torch.are_deterministic_algorithms_enabled():
        return a @ b
    # There a GPU's library may refuse. A product is added up in a fixed order all the same.
    width = max(1, _CHUNK // max(1, a.numel()))
    columns = [(a[:, :, None] * part[None]).sum(1) for part in torch.split(b, width, dim=1)]
    return torch.cat(columns, 1) if columns else a.new_zeros(a.shape[0], 0)


def moved(problem: Problem) -> Tensor:
    """W - W0, or W, in the float64 of what is subtracted in float32."""
    assert problem.weight is not None
    if problem.base is None:
        return problem.weight.double()
    # W0 as a model of W's dtype holds it.
    return problem.weight.double() - problem.base.to(problem.weight.dtype).double()


def expected_drift(problem: Problem) -> Expected:
    """``C = U^T (W - W0) V``, ``U^T W V - B`` or ``U^T W V``."""
    assert problem.left is not None and problem.right is not None
    left, right, x = problem.left.double(), problem.right.double(), moved(problem)
    values, size = _sandwich(left.T, x, right)
    if problem.block is None:
        return Expected(values, size)
    block = problem.block.double()
    return Expected(values - block, torch.hypot(size, block))


def expected_pull(problem: Problem, scale: float) -> Expected:
    """``scale * U C V^T``."""
    assert problem.left is not None and problem.right is not None and problem.drift is not None
    values, size = _sandwich(problem.left.double(), problem.drift.double(), problem.right.double().T)
    return Expected(values.mul_(scale), size.mul_(abs(scale)))


def _sandwich(a: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return matmul(matmul(a, x), b), matmul(matmul(a.square(), x.square()), b.square()).sqrt_()
