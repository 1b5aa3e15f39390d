"""The work on replicated weights, divided over ranks by its cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..costs import step_flops
from .shard import Shard
from .weight import LocalWeight, ReplicatedWeight

# Of a rank's share: how far a boundary may move to fall between two weights. A weight that is not cut needs no sum of
# its C over ranks.
_SLACK = 0.03
# Cut weights begin at multiples of this many rows or columns, whatever their dtype: kernels load 16 bytes at a time.
_MULTIPLE = 64


def divide(shapes: Sequence[tuple[int, int]], ranks: Sequence[int], size: int) -> list[list[Shard]]:
    """Parts of every weight for each of ``size`` ranks, about equal in arithmetic: ``parts[weight][rank]``.

    Weights in their order are laid end to end and cut into equal lengths; a cut near a weight's end is moved there, any
    other goes through the weight's longer side. It depends on nothing but its arguments.

    Args:
        shapes: (m, n) of each weight.
        ranks: k of each anchor.
        size: number of processes, at least 1.
    """
    costs = [step_flops(shape, rank) for shape, rank in zip(shapes, ranks, strict=True)]
    share = sum(costs) / size
    # cuts[i]: (process that ends here, fraction of weight i) in order.
    ends: list[list[tuple[int, float]]] = [[] for _ in shapes]
    before, process = 0.0, 0
    for i, cost in enumerate(costs):
        while process < size - 1 and share * (process + 1) <= before + cost + _SLACK * share:
            inside = share * (process + 1) - before
            if inside < _SLACK * share:
                inside = 0.0
            elif inside > cost - _SLACK * share:
                inside = float(cost)
            ends[i].append((process, inside / cost if cost else 0.0))
            process += 1
        before += cost
    current, parts = 0, []
    for shape, cuts in zip(shapes, ends, strict=True):
        row = [Shard.nothing(shape) for _ in range(size)]
        longer = max(shape)
        start = 0
        for process, fraction in [*cuts, (-1, 1.0)]:
            stop = longer if fraction >= 1.0 else min(longer, round(longer * fraction / _MULTIPLE) * _MULTIPLE)
            if stop > start:
                spans = ((start, stop), (0, shape[1])) if shape[0] >= shape[1] else ((0, shape[0]), (start, stop))
                row[current] = Shard.rectangle(shape, *spans)
                start = stop
            if process >= 0:
                current = process + 1
        if sum(part.numel > 0 for part in row) == 1:
            row = [Shard.whole(shape) if part.numel else Shard.nothing(shape, unsharded=True) for part in row]
        parts.append(row)
    return parts


def with_parts(weights: Mapping[str, LocalWeight], ranks: Mapping[str, int]) -> dict[str, LocalWeight]:
    """The same weights; of replicated ones, this process's part of the work. ``ranks`` are k of their anchors."""
    result = dict(weights)
    groups: dict[str, list[ReplicatedWeight]] = {}
    names: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if isinstance(weight, ReplicatedWeight) and weight.group is not None:
            groups.setdefault(weight.group.group_name, []).append(weight)
            names.setdefault(weight.group.group_name, []).append(name)
    for key, members in groups.items():
        group = members[0].group
        assert group is not None
        shapes = [(weight.shape[0], weight.shape[1]) for weight in members]
        parts = divide(shapes, [ranks[name] for name in names[key]], group.size())
        for name, weight, row in zip(names[key], members, parts, strict=True):
            result[name] = weight.divided(row[group.rank()], group.size())
    return result
