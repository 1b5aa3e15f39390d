"""Bounds of the kernels' error against float64: twice plain PyTorch's, and floors that single roundings explain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from support import Problem, exact_drift, exact_moved, exact_pull, relative_error


def plain_error(problem: Problem) -> float:
    """The error of the same formula in plain PyTorch, rounded to bfloat16 where the kernels round."""
    assert problem.left is not None and problem.right is not None
    exact = exact_drift(problem.weight, problem)
    rounded = problem.base is not None and problem.left.dtype == torch.bfloat16
    moved = problem.weight.float() - (0 if problem.base is None else problem.base.to(problem.weight.dtype).float())
    if rounded:
        t = (moved.bfloat16() @ problem.right).float()
        drift = problem.left.T.float() @ t.bfloat16().float()
    else:
        drift = problem.left.float().T @ (moved @ problem.right.float())
    if problem.block is not None:
        drift -= problem.block
    return relative_error(drift, exact)


def check_drifts(problems: Sequence[Problem], drifts: Sequence[Tensor], squares: Tensor) -> None:
    for problem, drift, square in zip(problems, drifts, squares, strict=True):
        exact = exact_drift(problem.weight, problem)
        # Twice plain PyTorch's error; the floor bounds the roundings of one lucky small matrix: two of bfloat16 (of the
        # drift and of T) where the base form promises no more, else a few of float32, relative to what is summed.
        moved = exact_moved(problem.weight, problem.base)
        once = problem.base is not None and problem.left is not None and problem.left.dtype == torch.bfloat16
        floor = float((2.0**-8 if once else 1e-6) * moved.norm() / exact.norm()) if exact.norm() else 0.0
        assert relative_error(drift, exact) <= 2 * plain_error(problem) + floor
        torch.testing.assert_close(square.double(), drift.double().square().sum(), rtol=1e-5, atol=0.0)


def check_pulled(grad: Tensor, before: Tensor | None, drift: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """``grad = scale * U C V^T``, or that added to ``before``."""
    exact = exact_pull(drift, left, right, scale)
    # bfloat16 bases: C and P are rounded once each, 2^-9 of the pulled gradient; then one rounding of the result.
    allowed = (2.0**-8 if left.dtype == torch.bfloat16 else 2e-6) * float(exact.norm())
    if before is not None:
        exact = exact + before.double()
    allowed += torch.finfo(grad.dtype).eps * float(exact.norm())
    assert float((grad.double() - exact).norm()) <= allowed
