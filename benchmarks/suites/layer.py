"""The weights that the benchmarks time: as after some training, with gradients that exist, and their exact gradients
in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from benchmarks.fidelity.contract import Agreement
from rpsft_kernels.anchors.tensors import pad_rows
from rpsft_kernels.costs import elementwise_bytes, is_full, projected_flops

# ||W - W0|| / ||W0|| before rounding. A bfloat16 weight moves only where the drift exceeds half a unit in the last
# place: random weights would not move at all with a much smaller one. The drift of float32 weights is that of tens of
# steps at the published learning rate.
RELATIVE_DRIFT = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
_WEIGHT_SCALE = 0.02
# Rows that go through float64 together: 128 MiB.
_CHUNK_ELEMENTS = 1 << 24


class Layer:
    """Weights (m, n) with gradients, and orthonormal U (m, k), V (n, k) of their shapes.

    U and V are random, as a singular value decomposition of every weight would take longer than the benchmark. The
    pretrained weights are built on them, with decaying singular values that hold half of their energy, because the
    rounding errors of products as large as the weight depend on that. They are exact in bfloat16, as those of a
    bfloat16 checkpoint are.

    Args:
        shapes: (m, n) of each weight.
        rank: k. A weight whose shorter side is at most k is anchored whole (the full form), as the package and the
            published trainer do it.
        dtype: dtype of weights and gradients; bfloat16 or float32.
        seed: seed of all random numbers.
        device: device of all tensors.
        flat: constants instead of random numbers, for measurements that do not depend on values.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        rank: int,
        dtype: torch.dtype,
        seed: int,
        device: torch.device,
        flat: bool = False,
    ) -> None:
        random = torch.Generator(device).manual_seed(seed)

        def normal(rows: int, cols: int) -> Tensor:
            if flat:
                return torch.full((rows, cols), 0.1, device=device)
            return torch.randn((rows, cols), generator=random, device=device)

        def basis(rows: int, cols: int) -> Tensor:
            return normal(rows, cols) if flat else torch.linalg.qr(normal(rows, cols))[0].contiguous()

        self.shapes = [(m, n) for m, n in shapes]
        self.ranks = [min(rank, m, n) for m, n in shapes]
        self.is_full = [is_full(shape, rank) for shape in shapes]
        # A full anchor has no U and V.
        sizes = [0 if full else k for k, full in zip(self.ranks, self.is_full, strict=True)]
        self.lefts = [basis(m, k) for (m, _), k in zip(shapes, sizes, strict=True)]
        self.rights = [basis(n, k) for (_, n), k in zip(shapes, sizes, strict=True)]
        self.weights: list[Tensor] = []
        self.pretrained: list[Tensor] = []
        for (m, n), left, right in zip(shapes, self.lefts, self.rights, strict=True):
            before = normal(m, n)
            if left.shape[1]:
                squares = torch.arange(1, left.shape[1] + 1, device=device).reciprocal()
                before.addmm_(left * (m * n * squares / squares.sum()).sqrt(), right.T)
            before = before.mul_(_WEIGHT_SCALE).bfloat16()
            noise = normal(m, n).mul_(_WEIGHT_SCALE * RELATIVE_DRIFT[dtype])
            self.weights.append(noise.add_(before).to(dtype).requires_grad_())
            self.pretrained.append(before.to(dtype))
        self._exact: list[Tensor] | None = None
        self.clear_gradients()

    @cached_property
    def subspaces(self) -> list[tuple[Tensor, Tensor]]:
        """U and V of each weight in bfloat16, laid out as an anchor holds them and shared by all providers."""
        pairs = zip(self.lefts, self.rights, strict=True)
        return [(pad_rows(left.bfloat16()), pad_rows(right.bfloat16())) for left, right in pairs]

    @cached_property
    def bf16_pretrained(self) -> list[Tensor]:
        """W0 in bfloat16, which holds it exactly."""
        return [before.bfloat16() for before in self.pretrained]

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    @property
    def elements(self) -> int:
        return sum(weight.numel() for weight in self.weights)

    @property
    def necessary_flops(self) -> int:
        """4mnk + 4k^2 min(m, n) for each weight, the k x k products on the cheaper side; none for a full anchor."""
        return sum(
            0 if full else projected_flops(shape, k)
            for shape, k, full in zip(self.shapes, self.ranks, self.is_full, strict=True)
        )

    def necessary_bytes(self, reads_base: bool) -> int:
        """Count W read once, its gradient read and written, U and V read once in bfloat16, and W0 where it is kept.

        Args:
            reads_base: whether W0 is read beside U and V, as it is not in the block form. A full anchor is W0.
        """
        total = 0
        for weight, (m, n), k, full in zip(self.weights, self.shapes, self.ranks, self.is_full, strict=True):
            total += elementwise_bytes(weight.numel(), weight.element_size(), base_reads=int(reads_base or full))
            total += 0 if full else 2 * (m + n) * k
        return total

    @cached_property
    def drift(self) -> float:
        """``||W - W0|| / ||W0||`` over all weights, as they are rounded."""
        moved = size = 0.0
        for i in range(len(self.weights)):
            for rows, drift in self._drifts(i):
                moved += float(drift.square().sum())
                size += float(self.pretrained[i][rows].double().square().sum())
        return math.sqrt(moved / size)

    def clear_gradients(self) -> None:
        for weight in self.weights:
            # fill_ and not zeros: every page of an existing gradient is resident.
            if weight.grad is None:
                weight.grad = torch.empty_like(weight)
            weight.grad.fill_(0)

    @contextmanager
    def at_anchor(self) -> Iterator[None]:
        """Give the weights their pretrained values inside, and their own again afterwards; gradients are cleared."""
        moved = [weight.data for weight in self.weights]
        for weight, before in zip(self.weights, self.pretrained, strict=True):
            weight.data = before
        try:
            yield
        finally:
            for weight, after in zip(self.weights, moved, strict=True):
                weight.data = after
            self.clear_gradients()

    def gradient_errors(self) -> list[float]:
        """Return each weight's ``||G - E|| / ||E||``: G its ``.grad``, E = dR/dW in float64 with unrounded U and V."""
        errors = []
        for i, weight in enumerate(self.weights):
            gradient = weight.grad
            assert gradient is not None
            agreement = Agreement()
            for rows, exact in self._exact_rows(i):
                agreement = agreement + Agreement.of(gradient[rows], exact)
            errors.append(agreement.relative_error)
        return errors

    def worst_gradient_error(self) -> float:
        """Return the largest of all weights' errors; NaN where one is NaN."""
        errors = self.gradient_errors()
        return math.nan if any(map(math.isnan, errors)) else max(errors)

    def _exact_rows(self, index: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield E in chunks of rows: ``2 U C V^T``, or ``2 (W - W0)`` under a full anchor."""
        if self.is_full[index]:
            for rows, drift in self._drifts(index):
                yield rows, 2 * drift
            return
        right = self.rights[index].double().T
        core = 2 * self._cores[index]
        for rows in self._chunks(index):
            yield rows, self.lefts[index][rows].double() @ core @ right

    @property
    def _cores(self) -> list[Tensor]:
        """C = U^T (W - W0) V in float64; computed once, as the weights come back to the same values."""
        if self._exact is None:
            self._exact = []
            for i, (left, right) in enumerate(zip(self.lefts, self.rights, strict=True)):
                core = left.new_zeros((left.shape[1], right.shape[1]), dtype=torch.float64)
                if not self.is_full[i]:
                    v = right.double()
                    for rows, drift in self._drifts(i):
                        core.addmm_(left[rows].double().T, drift @ v)
                self._exact.append(core)
        return self._exact

    def _chunks(self, index: int) -> Iterator[slice]:
        m, n = self.shapes[index]
        step = max(1, _CHUNK_ELEMENTS // n)
        return (slice(start, min(start + step, m)) for start in range(0, m, step))

    def _drifts(self, index: int) -> Iterator[tuple[slice, Tensor]]:
        weight, before = self.weights[index].detach(), self.pretrained[index]
        for rows in self._chunks(index):
            yield rows, weight[rows].double() - before[rows].double()
