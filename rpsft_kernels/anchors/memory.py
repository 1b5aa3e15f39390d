"""What anchors take, before any is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checks import check_basis_dtype
from ..costs import kept_bytes, subspace_bytes
from ..distributed import LocalWeight, with_parts
from ..distributed.layout_plan import Layout, parts_of


@dataclass(frozen=True)
class AnchorMemory:
    """Bytes of anchors by rank; prints as a line.

    Attributes:
        per_rank: All pieces, one number for each rank.
        bases: Of these, U and V.
        kept: The rest: W0, or the blocks.
    """

    bases: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def per_rank(self) -> tuple[int, ...]:
        return tuple(b + k for b, k in zip(self.bases, self.kept, strict=True))

    def __str__(self) -> str:
        most = max(range(len(self.kept)), key=self.per_rank.__getitem__)
        return (
            f"{in_units(self.per_rank[most])} on the fullest of {len(self.kept)} ranks ({in_units(self.bases[most])} "
            f"of U and V, {in_units(self.kept[most])} of W0 or blocks)"
        )


def anchor_memory(
    weights: Mapping[str, LocalWeight],
    rank: int,
    keep_base: bool,
    basis_dtype: torch.dtype,
    ranks: int | None,
    layout: Layout,
) -> AnchorMemory:
    """Of the anchors of ``weights`` as they lie (this rank alone), or as they would over ``ranks``."""
    shapes = {name: (weight.shape[0], weight.shape[1]) for name, weight in weights.items()}
    for weight in weights.values():
        check_basis_dtype(basis_dtype, weight.dtype, "basis_dtype")
    if ranks is None:
        held = with_parts(weights, {name: min(rank, *shape) for name, shape in shapes.items()})
        rows = [[held[name].shard] for name in weights]
    else:
        rows = parts_of(list(shapes.values()), rank, ranks, layout)
    bases, kept = [0] * len(rows[0]), [0] * len(rows[0])
    for weight, row in zip(weights.values(), rows, strict=True):
        for i, part in enumerate(row):
            bases[i] += subspace_bytes(part, rank, basis_dtype.itemsize)
            kept[i] += kept_bytes(part, rank, keep_base, weight.dtype.itemsize)
    return AnchorMemory(tuple(bases), tuple(kept))


def in_units(count: int) -> str:
    """``1536`` bytes as ``"1.5 KiB"``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
