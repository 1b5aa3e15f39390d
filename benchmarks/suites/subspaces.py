"""Measures methods that find the singular subspaces of an anchor: seconds a matrix, and captured energy."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

import rpsft_kernels as rk
from benchmarks.reporting.results import Role
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.measure import Clock, Entrant

# U (m, k) and V (n, k).
Subspaces = tuple[Tensor, Tensor]
# Largest relative loss of captured energy through U and V in bfloat16.
MAX_SHORTFALL = 1e-3


def _ours(weight: Tensor, rank: int) -> Subspaces:
    anchor = rk.Anchor.from_weight(weight, rank)
    assert anchor.left is not None and anchor.right is not None
    return anchor.left, anchor.right


def _svd(weight: Tensor, rank: int) -> Subspaces:
    left, _, right = torch.linalg.svd(weight.float(), full_matrices=False)
    return left[:, :rank], right[:rank].T


def _lowrank(weight: Tensor, rank: int) -> Subspaces:
    left, _, right = torch.svd_lowrank(weight.float(), q=rank)
    return left, right


METHODS: dict[str, tuple[Role, Callable[[Tensor, int], Subspaces], float | None]] = {
    "Anchor.from_weight": ("ours", _ours, MAX_SHORTFALL),
    "torch.linalg.svd, fp32": ("reference", _svd, None),
    "torch.svd_lowrank, fp32": ("reference", _lowrank, None),
}


def make_decaying(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Make a random weight whose i-th singular value falls about as i^-1/2, as in trained weights."""
    random = torch.Generator(device).manual_seed(0)
    inner = min(shape)
    values = torch.arange(1, inner + 1, device=device).rsqrt()
    left = torch.randn((shape[0], inner), generator=random, device=device) * values
    right = torch.randn((inner, shape[1]), generator=random, device=device)
    return (0.02 * (left @ right) / inner**0.5).to(dtype)


def best_energy(weight: Tensor, rank: int) -> float:
    """Compute the share of ``||W||_F^2`` in the ``rank`` largest singular values, in float64."""
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T)
    return float(eigenvalues[-rank:].sum() / eigenvalues.sum())


def captured_energy(weight: Tensor, subspaces: Subspaces) -> float:
    """Compute ``||U^T W V||_F^2 / ||W||_F^2`` in float64: the share of the weight that the penalty sees."""
    left, right = (basis.double() for basis in subspaces)
    exact = weight.double()
    return float((left.T @ exact @ right).square().sum() / exact.square().sum())


def enter(case: BenchCase, clock: Clock) -> list[Entrant]:
    """Make an entrant of each method on one weight; reject this package's where it captures too little.

    ``error`` is the share of the best possible energy that a method's subspaces lack.
    """
    weight = make_decaying(case.shapes[0], case.dtype, clock.device)
    best = best_energy(weight, case.rank)
    entrants = []
    for name, (role, method, bound) in METHODS.items():
        if not case.takes(name):
            continue
        entrant = Entrant(name, role, bound)
        entrants.append(entrant)
        try:
            start = time.perf_counter()
            subspaces = method(weight, case.rank)
            clock.synchronize()
            entrant.step_seconds = time.perf_counter() - start
        except torch.OutOfMemoryError:
            entrant.reject("not run", "out of memory")
            continue
        entrant.energy = min(1.0, captured_energy(weight, subspaces))
        entrant.error = abs(1 - entrant.energy / best)
        # The comparison is written so that NaN is wrong.
        if bound is not None and not entrant.error <= bound:
            entrant.reject("wrong", f"captured energy {entrant.energy:.6f}, expected {best:.6f}")
        else:
            entrant.steps = [_step(method, weight, case.rank)]
    return entrants


def _step(method: Callable[[Tensor, int], Subspaces], weight: Tensor, rank: int) -> Callable[[], None]:
    def step() -> None:
        method(weight, rank)

    return step
