"""R and the coefficients of its gradients from images of factors: small matrices, many layers in one product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops


class LayerSpec(NamedTuple):
    """Everything about a layer that its images' shapes and the formulas depend on.

    Attributes:
        scalings: s of each active adapter.
        ranks: r of each.
        started: whether each has a start B0 A0 that is not 0.
        left_columns: columns of images of B: k, or in the full form the number of outputs.
        right_columns: columns of images of A: k, or the number of inputs.
        dtype: of the images.
        device: of the images.
    """

    scalings: tuple[float, ...]
    ranks: tuple[int, ...]
    started: tuple[bool, ...]
    left_columns: int
    right_columns: int
    dtype: torch.dtype
    device: torch.device

    @property
    def kind(self) -> tuple[object, ...]:
        """Layers of one kind are computed together."""
        return self[1:]


class LayerImages(NamedTuple):
    """The images of one layer's factors, for each of its active adapters.

    An adapter that was B0 and A0 when its weight was anchored has moved the weight by
    ``s ((B - B0) A + B0 (A - A0))``: nothing cancels in that, and it is exactly 0 at the start.

    Attributes:
        ups: ``(B - B0)^T U`` (r, k); in the full form ``(B - B0)^T`` itself.
        downs: ``A V`` (r, k); in the full form A itself.
        start_ups: ``B0^T U``; None where there is no start.
        start_downs: ``(A - A0) V``; None where there is no start.
    """

    ups: Sequence[Tensor]
    downs: Sequence[Tensor]
    start_ups: Sequence[Tensor | None]
    start_downs: Sequence[Tensor | None]


class Batches:
    """Layers sorted into batches of one kind. It is made once for the layers of a plan.

    Args:
        specs: of the layers, in their order. They lie on one device.
    """

    def __init__(self, specs: Sequence[LayerSpec]) -> None:
        kinds: dict[tuple[object, ...], list[int]] = {}
        for i, spec in enumerate(specs):
            kinds.setdefault(spec.kind, []).append(i)
        self._specs = [specs[members[0]] for members in kinds.values()]
        self._members = list(kinds.values())
        device = specs[0].device
        self._scalings = [
            torch.tensor([specs[i].scalings for i in members], dtype=_wide(device, spec.dtype), device=device)
            for members, spec in zip(self._members, self._specs, strict=True)
        ]
        places = [place for members in self._members for place in members]
        order = sorted(range(len(places)), key=places.__getitem__)
        self._order = torch.tensor(order, device=device)
        self._dtype = torch.float64 if any(spec.dtype == torch.float64 for spec in specs) else torch.float32

    def stack(self, images: Sequence[LayerImages]) -> list[Batch]:
        """Stack the images of all layers."""
        return [
            Batch.stack(spec, members, scalings, [images[i] for i in members])
            for spec, members, scalings in zip(self._specs, self._members, self._scalings, strict=True)
        ]

    def penalties(self, batches: Sequence[Batch]) -> Tensor:
        """Return R of each layer, in the layers' order."""
        return torch.cat([batch.penalties().to(self._dtype) for batch in batches])[self._order]


@dataclass(frozen=True, eq=False)
class Batch:
    """Layers of one kind, their stacked images X and Y (layers, r', k): the drift is ``X^T Y``.

    Attributes:
        spec: of the layers, but for their ``scalings``.
        members: the layers' places.
        scalings: s (layers, adapters).
        lefts: X, the images of B times s; below those of an adapter lie those of its start.
        rights: Y, the images of A.
    """

    spec: LayerSpec
    members: list[int]
    scalings: Tensor
    lefts: Tensor
    rights: Tensor

    @classmethod
    def stack(cls, spec: LayerSpec, members: list[int], scalings: Tensor, images: Sequence[LayerImages]) -> Batch:
        # Sums of products of the r x r matrices may cancel, where B and A have turned and B A has not: these small
        # matrices are in float64, where the device has it.
        wide = scalings.dtype
        lefts, rights = [], []
        for j, started in enumerate(spec.started):
            scaling = scalings[:, j, None, None]
            lefts.append(torch.stack([layer.ups[j] for layer in images]).to(wide) * scaling)
            rights.append(torch.stack([layer.downs[j] for layer in images]).to(wide))
            if started:
                lefts.append(torch.stack([_present(layer.start_ups[j]) for layer in images]).to(wide) * scaling)
                rights.append(torch.stack([_present(layer.start_downs[j]) for layer in images]).to(wide))
        return cls(spec, members, scalings, torch.cat(lefts, 1), torch.cat(rights, 1))

    @cached_property
    def _grams(self) -> tuple[Tensor, Tensor]:
        with ops.without_autocast(self.lefts.device):
            return self.lefts @ self.lefts.mT, self.rights @ self.rights.mT

    def penalties(self) -> Tensor:
        """Return R of each layer: ``||X^T Y||^2 = <X X^T, Y Y^T>``."""
        left, right = self._grams
        # Rounding may leave a sum that should be 0 below it.
        return (left * right).sum((1, 2)).clamp(min=0)

    def coefficients(self, factor: float | Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the coefficients (layers, r, k) of each adapter's gradients: ``coefficient U^T`` is B's, transposed,
        and ``coefficient V^T`` is A's.

        Args:
            factor: what R is multiplied by.
        """
        left, right = self._grams
        result, first = [], 0
        for j, (rank, started) in enumerate(zip(self.spec.ranks, self.spec.started, strict=True)):
            own = slice(first, first + rank)
            first += rank * (2 if started else 1)
            # B is B - B0 and B0 together, and so are its rows of X.
            gram = left[:, own] + left[:, own.stop : first] if started else left[:, own]
            with ops.without_autocast(self.lefts.device):
                ups = (2 * factor * self.scalings[:, j, None, None]) * (right[:, own] @ self.lefts)
                downs = (2 * factor) * (gram @ self.rights)
            result.append((ups.to(self.spec.dtype), downs.to(self.spec.dtype)))
        return result


def _present(image: Tensor | None) -> Tensor:
    assert image is not None
    return image


def _wide(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if ops.has_float64(device) else dtype
