"""Assigns shards to ranks: the work on replicated weights is divided by its cost, and layouts are planned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Literal, get_args

from ..costs import step_flops
from .shard import Shard, Span
from .weight import LocalWeight, ReplicatedWeight

Layout = Literal["shard0", "replicated", "flat"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

# How far a boundary may move to fall between two weights, as a fraction of a rank's share: a weight that is not cut
# needs no sum of its C over ranks.
_SLACK = 0.03
# Cut weights begin at multiples of this many rows or columns, whatever their dtype: kernels load 16 bytes at a time.
_MULTIPLE = 64


def divide(shapes: Sequence[tuple[int, int]], anchor_ranks: Sequence[int], world_size: int) -> list[list[Shard]]:
    """Divide the weights into shards for each process, about equal in FLOPs: ``shards[weight][process]``.

    Weights in their order are laid end to end and cut into equal lengths; a cut near a weight's end is moved there, any
    other goes through the weight's longer side. The result depends on the arguments alone.

    Args:
        shapes: (m, n) of each weight.
        anchor_ranks: k of each anchor.
        world_size: number of processes, at least 1.
    """
    costs = [step_flops(shape, rank) for shape, rank in zip(shapes, anchor_ranks, strict=True)]
    shards, first = [], 0
    for shape, cuts in zip(shapes, _cuts(costs, world_size), strict=True):
        row = [Shard.nothing(shape) for _ in range(world_size)]
        start = 0
        # The process after the last cut works on the rest.
        for process, fraction in [*enumerate(cuts, first), (first + len(cuts), 1.0)]:
            stop = _boundary(max(shape), fraction)
            if stop > start:
                row[process] = _slab(shape, (start, stop))
                start = stop
        first += len(cuts)
        if sum(shard.numel > 0 for shard in row) == 1:
            row = [Shard.whole(shape) if shard.numel else Shard.nothing(shape, unsharded=True) for shard in row]
        shards.append(row)
    return shards


def _cuts(costs: Sequence[int], world_size: int) -> list[list[float]]:
    """Return, for each weight, the fractions of it where one process's share ends and the next one's begins."""
    share = sum(costs) / world_size
    cuts: list[list[float]] = [[] for _ in costs]
    before, process = 0.0, 0
    for i, cost in enumerate(costs):
        while process < world_size - 1 and share * (process + 1) <= before + cost + _SLACK * share:
            inside = share * (process + 1) - before
            if inside < _SLACK * share:
                inside = 0.0
            elif inside > cost - _SLACK * share:
                inside = float(cost)
            cuts[i].append(inside / cost if cost else 0.0)
            process += 1
        before += cost
    return cuts


def _boundary(length: int, fraction: float) -> int:
    return length if fraction >= 1.0 else min(length, round(length * fraction / _MULTIPLE) * _MULTIPLE)


def _slab(shape: tuple[int, int], span: Span) -> Shard:
    """Make a shard of ``span`` of the longer side and all of the shorter one."""
    m, n = shape
    return Shard.rectangle(shape, span, (0, n)) if m >= n else Shard.rectangle(shape, (0, m), span)


def assign_shards(
    weights: Mapping[str, LocalWeight], anchor_ranks: Mapping[str, int], copies: Collection[str] = ()
) -> dict[str, LocalWeight]:
    """Return the same weights; replicated ones with this process's shard of the work.

    Args:
        weights: by name; those that one group replicates are divided together, in their order, but for those of which
            each rank has a share that it alone can do.
        anchor_ranks: k of each weight's anchor.
        copies: names of the weights of which any rank can do any share all the same, because masters do not count.
    """
    assigned = dict(weights)
    replicated: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if isinstance(weight, ReplicatedWeight) and weight.group is not None:
            own = None if name in copies else weight.own_share
            if own is None:
                replicated.setdefault(weight.group_name, []).append(name)
            else:
                assigned[name] = weight.with_work(own)
    for names in replicated.values():
        group = weights[names[0]].group
        assert group is not None
        shapes = [(weights[name].shape[0], weights[name].shape[1]) for name in names]
        shards = divide(shapes, [anchor_ranks[name] for name in names], group.size())
        for name, row in zip(names, shards, strict=True):
            assigned[name] = weights[name].with_work(row[group.rank()])
    return assigned


def plan_shards(
    shapes: Sequence[tuple[int, int]], rank: int | Sequence[int], world_size: int, layout: Layout
) -> list[list[Shard]]:
    """Plan the shard of each weight (m, n) for each of N = ``world_size`` processes: ``shards[weight][process]``.

    ``"shard0"``: chunks of ceil(m / N) rows (FSDP2). ``"replicated"``: weights whole, their work divided (DDP).
    ``"flat"``: ranges of ceil(m n / N) elements of each weight (DeepSpeed ZeRO-3). ``rank`` is k, of all weights or of
    each.

    Raises:
        ValueError: k = ``rank`` or ``world_size`` is less than 1, or there is no such layout.
    """
    anchor_ranks = [rank] * len(shapes) if isinstance(rank, int) else rank
    if min(anchor_ranks, default=1) < 1 or world_size < 1 or layout not in LAYOUTS:
        raise ValueError(
            f"rank, ranks, layout: got {rank}, {world_size}, {layout!r}, expected at least 1 each, and one of {LAYOUTS}"
        )
    if world_size == 1:
        return [[Shard.whole(shape)] for shape in shapes]
    if layout == "replicated":
        return divide(shapes, [min(k, *shape) for k, shape in zip(anchor_ranks, shapes, strict=True)], world_size)
    if layout == "shard0":
        return [[Shard.rectangle((m, n), span, (0, n)) for span in _chunks(m, world_size)] for m, n in shapes]
    return [[Shard.range((m, n), *span) for span in _chunks(m * n, world_size)] for m, n in shapes]


def _chunks(length: int, count: int) -> list[Span]:
    """Return the spans that torch.chunk cuts, with empty ones at the end."""
    size = -(-length // count)
    return [(min(length, size * i), min(length, size * (i + 1))) for i in range(count)]
