"""What an adapter was when its weight was anchored, where that is not nothing: the penalty counts from there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdapterStart:
    """The values of one adapter at the moment of anchoring. W0 has them in it.

    Attributes:
        scaling: s.
        up: B0 (out, r); None where B0 A0 was 0.
        down: A0 (r, in); None where ``up`` is.
        scale: DoRA's ``g0 = magnitude / ||rows of W + s B0 A0||`` (out,); None for adapters without magnitudes, and
            where the rows count from a scale of 1.

    Raises:
        ValueError: there is one of B0 and A0 without the other, or they are no factors of one product.
    """

    scaling: float
    up: Tensor | None = None
    down: Tensor | None = None
    scale: Tensor | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scaling, float):
            raise ValueError(f"scaling: got {self.scaling!r}, expected a float")
        if (self.up is None) != (self.down is None):
            raise ValueError("start: got one of up and down, expected both or none of them")
        if self.up is not None and self.down is not None:
            shapes = tuple(self.up.shape), tuple(self.down.shape)
            if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
                raise ValueError(f"start: got up and down of shapes {shapes}, expected (out, r) and (r, in)")
        for name, piece in self.pieces().items():
            if not piece.is_floating_point() or not bool(piece.isfinite().all()):
                raise ValueError(f"start: got {name} with NaN, infinity or integers, expected finite numbers")

    def pieces(self) -> dict[str, Tensor]:
        """Return the tensors that there are, by attribute name."""
        named = {"up": self.up, "down": self.down, "scale": self.scale}
        return {name: piece for name, piece in named.items() if piece is not None}

    def to(self, device: torch.device | str) -> AdapterStart:
        moved = {name: piece.to(device) for name, piece in self.pieces().items()}
        return AdapterStart(self.scaling, **moved)

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces().values())


def name_pieces(starts: Mapping[str, AdapterStart]) -> dict[str, Tensor]:
    """Return the tensors of several adapters' starts by name, such as ``"start.default.up"``."""
    return {
        f"start.{adapter}.{name}": piece for adapter, start in starts.items() for name, piece in start.pieces().items()
    }
