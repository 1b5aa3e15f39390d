"""The formulas in float64, and bounds of the errors that rounding may cause in a backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .inputs import Sample

# Elements of a float64 temporary, where products are computed without a library.
_CHUNK = 1 << 24
# Allowed errors, in units of the size of the sum (Expected.size). Where factors are rounded to bfloat16 (2^-9 each),
# the bound is some standard deviations above the largest error of a million numbers. Else it is the loss of float32
# sums: tensor cores truncate the terms that they add, so that errors of hundreds of steps do not cancel. This bound is
# above the error of a lost third bfloat16 part (2^-18), which ``checks`` sees in the sums that are exact.
ROUNDED = 2.0**-5
WIDE = 2.0**-13


class Expected(NamedTuple):
    """Exact numbers, and for each the root of the sum of squares of the products that it is a sum of: independent
    relative errors of the factors grow in proportion to that.
    """

    values: Tensor
    size: Tensor


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Multiply float64 matrices."""
    if not torch.are_deterministic_algorithms_enabled():
        return a @ b
    # A GPU's library may refuse in this mode, so that products are added up here, in a fixed order.
    width = max(1, _CHUNK // max(1, a.numel()))
    columns = [(a[:, :, None] * chunk[None]).sum(1) for chunk in torch.split(b, width, dim=1)]
    return torch.cat(columns, 1) if columns else a.new_zeros(a.shape[0], 0)


def difference(sample: Sample) -> Tensor:
    """Return W - W0, or W, in float64."""
    assert sample.weight is not None
    if sample.base is None:
        return sample.weight.double()
    # W0 is read as a model of W's dtype holds it.
    return sample.weight.double() - sample.base.to(sample.weight.dtype).double()


def expected_drift(sample: Sample) -> Expected:
    """Return ``C = U^T (W - W0) V``, ``U^T W V - B`` or ``U^T W V``."""
    assert sample.left is not None and sample.right is not None
    left, right, x = sample.left.double(), sample.right.double(), difference(sample)
    values, size = _multiply_three(left.T, x, right)
    if sample.block is None:
        return Expected(values, size)
    block = sample.block.double()
    return Expected(values - block, torch.hypot(size, block))


def expected_pull(sample: Sample, scale: float) -> Expected:
    """Return ``scale * U C V^T``."""
    assert sample.left is not None and sample.right is not None and sample.drift is not None
    values, size = _multiply_three(sample.left.double(), sample.drift.double(), sample.right.double().T)
    return Expected(values.mul_(scale), size.mul_(abs(scale)))


def _multiply_three(a: Tensor, x: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return matmul(matmul(a, x), b), matmul(matmul(a.square(), x.square()), b.square()).sqrt_()
