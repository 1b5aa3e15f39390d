"""Fine-tuning in weights of one dtype: float64, the published formula and this package side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import rpsft_kernels as rk
from benchmarks.fidelity.contract import Agreement, AnchorForm, Measurement


class FidelityCase:
    """Weights that a model of ``dtype`` holds before and during fine-tuning, and their exact singular subspaces.

    Args:
        snapshots: Step -> name -> weight (m, n) as it was trained, step 0 being the pretrained one. Each is rounded
            to ``dtype``, and the drift is that between the rounded ones. At first, in bfloat16, it comes mostly from
            pretrained entries halfway between two neighbours (every tenth entry of SmolLM2's 4-bit checkpoint), which
            the smallest step moves by a whole unit in the last place.
        dtype: bfloat16, float16 or float32.
        rank: k, below every side of every weight.

    Raises:
        ValueError: ``rank`` makes an anchor full: there is nothing to compare.
    """

    def __init__(self, snapshots: Mapping[int, Mapping[str, Tensor]], dtype: torch.dtype, rank: int) -> None:
        shortest = min(min(weight.shape) for weight in snapshots[0].values())
        if not 1 <= rank < shortest:
            raise ValueError(
                f"rank: got {rank}, expected 1 to {shortest - 1}: from the shortest side of a weight on its "
                "anchor is full and has no bases"
            )
        self.rank = rank
        self.weights = {
            step: {name: weight.to(dtype) for name, weight in held.items()} for step, held in snapshots.items()
        }
        self._spaces = {name: _top_singular(weight, rank) for name, weight in self.weights[0].items()}
        self._anchors: dict[tuple[str, AnchorForm, str], rk.Anchor] = {}

    def relative_drift(self, step: int) -> float:
        """Compute ``||W - W0|| / ||W0||`` over all weights as one vector."""
        moved = sum(float(self._drift(step, name).square().sum()) for name in self.weights[0])
        return math.sqrt(moved / sum(float(w.double().square().sum()) for w in self.weights[0].values()))

    def exact_gradient(self, step: int, name: str) -> Tensor:
        """Compute ``2 U U^T (W - W0) V V^T`` in float64, with U and V unrounded; shape (m, n)."""
        left, _, right = self._spaces[name]
        return 2 * left @ (left.T @ self._drift(step, name) @ right) @ right.T

    def published(self, step: int) -> Measurement:
        """Measure the published formula ``||U^T W V - diag(s)||_F^2``, with U, s, V and a copy of W in float16.

        Written from the mathematics of arXiv 2605.10973, not from its authors' code: ``diag(s)`` stands for
        ``U^T W0 V``, every product is rounded to float16, and autograd does the rest.
        """

        def penalty(weights: Sequence[Tensor], names: Sequence[str]) -> Tensor:
            terms = []
            for name, weight in zip(names, weights, strict=True):
                left, values, right = (piece.half() for piece in self._spaces[name])
                terms.append((left.T @ weight.half() @ right - torch.diag(values)).square().sum().float())
            return torch.stack(terms).sum()

        return self._measure(step, list(self.weights[0]), penalty)

    def ours(self, step: int, backend: str, form: AnchorForm, names: Sequence[str] | None = None) -> Measurement:
        """Measure ``rotation_penalty`` on one backend, with anchors made there; ``names`` selects weights."""

        def penalty(weights: Sequence[Tensor], names: Sequence[str]) -> Tensor:
            return rk.rotation_penalty(weights, [self._anchor(name, form, backend) for name in names])

        with rk.use_backend(backend):
            return self._measure(step, list(self.weights[0] if names is None else names), penalty)

    def _measure(
        self, step: int, names: list[str], penalty: Callable[[Sequence[Tensor], Sequence[str]], Tensor]
    ) -> Measurement:
        leaves = [self.weights[step][name].clone().requires_grad_() for name in names]
        value = penalty(leaves, names)
        gradients = torch.autograd.grad(value, leaves)
        agreements = {
            name: Agreement.of(gradient, self.exact_gradient(step, name))
            for name, gradient in zip(names, gradients, strict=True)
        }
        return Measurement(value.item(), agreements)

    def _anchor(self, name: str, form: AnchorForm, backend: str) -> rk.Anchor:
        key = (name, form, backend)
        if key not in self._anchors:
            pretrained = self.weights[0][name]
            self._anchors[key] = rk.Anchor.from_weight(pretrained, self.rank, keep_base=form == "base")
        return self._anchors[key]

    def _drift(self, step: int, name: str) -> Tensor:
        return self.weights[step][name].double() - self.weights[0][name].double()


def _top_singular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    # The package's own function is not used: the reference is independent of it.
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank].T
