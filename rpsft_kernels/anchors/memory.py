"""Counts the bytes of anchors before any is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..checks import check_basis_dtype
from ..costs import kept_bytes, subspace_bytes
from ..distributed import LocalWeight, assign_shards
from ..distributed.partition import Layout, plan_shards
from .make import AnchorOptions


@dataclass(frozen=True)
class AnchorMemory:
    """Bytes of anchors by rank; prints as a line.

    Attributes:
        per_rank: All pieces, one number for each rank.
        subspaces: The bytes of U and V among them.
        kept: The others: W0, or the blocks.
    """

    subspaces: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def per_rank(self) -> tuple[int, ...]:
        return tuple(s + k for s, k in zip(self.subspaces, self.kept, strict=True))

    def __str__(self) -> str:
        fullest = max(range(len(self.kept)), key=self.per_rank.__getitem__)
        return (
            f"{format_bytes(self.per_rank[fullest])} on the fullest of {len(self.kept)} ranks "
            f"({format_bytes(self.subspaces[fullest])} of U and V, {format_bytes(self.kept[fullest])} of W0 or blocks)"
        )


def anchor_memory(
    weights: Mapping[str, LocalWeight], options: AnchorOptions, world_size: int | None, layout: Layout
) -> AnchorMemory:
    """Count the bytes of the anchors of ``weights`` as they lie (this rank alone), or as over ``world_size`` ranks."""
    for weight in weights.values():
        check_basis_dtype(options.basis_dtype, weight.dtype, "basis_dtype")
    if world_size is None:
        held = assign_shards(weights, options.effective_ranks(weights))
        shards_by_weight = [[held[name].shard] for name in weights]
    else:
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights.values()]
        shards_by_weight = plan_shards(shapes, options.rank, world_size, layout)
    subspaces, kept = [0] * len(shards_by_weight[0]), [0] * len(shards_by_weight[0])
    for weight, shards in zip(weights.values(), shards_by_weight, strict=True):
        for i, shard in enumerate(shards):
            subspaces[i] += subspace_bytes(shard, options.rank, options.basis_dtype.itemsize)
            kept[i] += kept_bytes(shard, options.rank, options.keep_base, weight.dtype.itemsize)
    return AnchorMemory(tuple(subspaces), tuple(kept))


def format_bytes(count: int) -> str:
    """Write ``1536`` bytes as ``"1.5 KiB"``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
