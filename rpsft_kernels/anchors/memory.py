"""Counts the bytes of anchors before any is made."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from ..checks import check_basis_dtype
from ..costs import is_full, kept_bytes, subspace_bytes
from ..distributed import LocalWeight, assign_shards
from ..distributed.partition import Layout, plan_shards
from ..low_rank.started import StartBytes
from .make import AnchorOptions


@dataclass(frozen=True)
class AnchorMemory:
    """Bytes of anchors by rank; prints as a line.

    Attributes:
        per_rank: All pieces, one number for each rank.
        subspaces: The bytes of U and V among them.
        kept: The others: W0, or the blocks, and what adapters were at their start.
        at_most: Whether the anchors may turn out smaller: for a share of energy, whose ranks are not known yet, and
            for adapters on the meta device, which may have no start.
    """

    subspaces: tuple[int, ...]
    kept: tuple[int, ...]
    at_most: bool = False

    @property
    def per_rank(self) -> tuple[int, ...]:
        return tuple(s + k for s, k in zip(self.subspaces, self.kept, strict=True))

    def __str__(self) -> str:
        fullest = max(range(len(self.kept)), key=self.per_rank.__getitem__)
        bound = "at most " if self.at_most else ""
        return (
            f"{bound}{format_bytes(self.per_rank[fullest])} on the fullest of {len(self.kept)} ranks "
            f"({format_bytes(self.subspaces[fullest])} of U and V, {format_bytes(self.kept[fullest])} of W0 or blocks)"
        )


def anchor_memory(
    weights: Mapping[str, LocalWeight],
    options: AnchorOptions,
    world_size: int | None,
    layout: Layout,
    without_base: Collection[str] = (),
    starts: Mapping[str, StartBytes] | None = None,
) -> AnchorMemory:
    """Count the bytes of the anchors of ``weights`` as they lie (this rank alone), or as over ``world_size`` ranks.

    Those of the weights named ``without_base`` have the block form, whatever ``options.keep_base``. Each rank keeps all
    of the ``starts`` of a weight's adapters.
    """
    for weight in weights.values():
        check_basis_dtype(options.basis_dtype, weight.dtype, "basis_dtype")
    planned = options.planned_ranks(weights)
    if world_size is None:
        held = assign_shards(weights, planned, {*without_base, *options.without_base(weights)})
        shards_by_weight = [[held[name].shard] for name in weights]
    else:
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights.values()]
        shards_by_weight = plan_shards(shapes, list(planned.values()), world_size, layout)
    subspaces, kept = [0] * len(shards_by_weight[0]), [0] * len(shards_by_weight[0])
    for (name, weight), shards in zip(weights.items(), shards_by_weight, strict=True):
        anchor_ranks = _dearest_ranks(shards[0].shape, planned[name], options)
        for i, shard in enumerate(shards):
            subspaces[i] += max(subspace_bytes(shard, rank, options.basis_dtype.itemsize) for rank in anchor_ranks)
            keep_base = options.keep_base and name not in without_base
            kept[i] += max(kept_bytes(shard, rank, keep_base, weight.dtype.itemsize) for rank in anchor_ranks)
    counted = (starts or {}).values()
    kept = [own + sum(start.nbytes for start in counted) for own in kept]
    at_most = options.share is not None or any(start.at_most for start in counted)
    return AnchorMemory(tuple(subspaces), tuple(kept), at_most)


def _dearest_ranks(shape: tuple[int, int], planned: int, options: AnchorOptions) -> list[int]:
    """List the ranks that an anchor may have, of which one takes the most bytes."""
    if options.share is None or not is_full(shape, planned) or min(shape) == 1:
        return [planned]
    # A full anchor has no U and V, so that one rank less may take more.
    return [planned - 1, planned]


def format_bytes(count: int) -> str:
    """Write ``1536`` bytes as ``"1.5 KiB"``."""
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
