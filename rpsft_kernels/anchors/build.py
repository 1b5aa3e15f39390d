"""Anchors made of a model's weights as they lie: each subspace computed once, each rank keeping its part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_basis_dtype, check_finite
from ..distributed import LocalWeight, ReplicatedWeight, Shard, Transfer
from .anchor import Anchor
from .fingerprint import Fingerprint
from .subspace import top_subspaces
from .tensors import base_copy, computed_block, padded


@dataclass(frozen=True)
class Request:
    """What every anchor is to be like."""

    rank: int
    keep_base: bool
    basis_dtype: torch.dtype


@dataclass(frozen=True)
class _Solved:
    """What the rank that computed a weight's subspaces tells the others; ``problem`` where it could not."""

    fingerprint: Fingerprint | None = None
    energy: float = 1.0
    base_dtype: torch.dtype = torch.bfloat16
    problem: str = ""


def build_anchors(weights: Mapping[str, LocalWeight], request: Request) -> Iterator[tuple[str, Anchor, Fingerprint]]:
    """Each weight's anchor, or that of the part that lies here; collective where weights lie on several ranks.

    A weight that lies on several ranks is brought together on one of them, one weight per rank at a time, and the ranks
    compute subspaces side by side; the rows of U and V that each rank needs are sent back.

    Raises:
        ValueError: a weight cannot be anchored, here or on another rank; the message names it.
    """
    groups: dict[str, list[str]] = {}
    for name, weight in weights.items():
        if weight.group is not None:
            groups.setdefault(weight.group.group_name, []).append(name)
            continue
        try:
            values = weight.values()
            anchor = Anchor.from_weight(
                values, request.rank, keep_base=request.keep_base, basis_dtype=request.basis_dtype
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        yield name, anchor, Fingerprint.of(name, values)
    for names in groups.values():
        yield from _build_together({name: weights[name] for name in names}, request)


def _build_together(weights: dict[str, LocalWeight], request: Request) -> Iterator[tuple[str, Anchor, Fingerprint]]:
    group = next(iter(weights.values())).group
    assert group is not None
    parts: list[Any] = [None] * group.size()
    dist.all_gather_object(parts, {name: weight.shard for name, weight in weights.items()}, group=group)
    if any(list(other) != list(weights) for other in parts):
        raise ValueError(
            "model: got other parameters to anchor on other ranks, expected the same include and exclude on all"
        )
    spread = {name: [of[name] for of in parts] for name in weights}
    for jobs in _rounds(weights, spread):
        yield from _one_round(jobs, weights, spread, request, group)


def _rounds(weights: dict[str, LocalWeight], spread: dict[str, list[Shard]]) -> Iterator[dict[str, int]]:
    """Which rank computes which weight's subspaces, at most one each at a time: dearest first, to the least busy."""

    def cost(name: str) -> float:
        m, n = weights[name].shape
        return float(m * n * min(m, n) + 10 * min(m, n) ** 3)

    busy = [0.0] * len(next(iter(spread.values())))
    queues: list[list[str]] = [[] for _ in busy]
    for name in sorted(weights, key=lambda name: (-cost(name), name)):
        alone = [i for i, part in enumerate(spread[name]) if part.is_whole]
        # Where one rank keeps the whole weight, nothing needs to be sent.
        solver = alone[0] if alone else min(range(len(busy)), key=busy.__getitem__)
        busy[solver] += cost(name)
        queues[solver].append(name)
    for i in range(max(map(len, queues))):
        yield {queue[i]: solver for solver, queue in enumerate(queues) if i < len(queue)}


def _one_round(
    jobs: dict[str, int],
    weights: dict[str, LocalWeight],
    spread: dict[str, list[Shard]],
    request: Request,
    group: dist.ProcessGroup,
) -> Iterator[tuple[str, Anchor, Fingerprint]]:
    me = group.rank()
    whole = _brought_together(jobs, weights, spread, group)
    mine: dict[str, _Solved] = {}
    bases: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in whole.items():
        try:
            mine[name] = _solve(name, tensor, request, bases)
        except ValueError as error:
            mine[name] = _Solved(problem=f"{name}: {error}")
    del whole
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    solved: dict[str, _Solved] = {name: told[solver][name] for name, solver in jobs.items()}
    for one in solved.values():
        if one.problem:
            raise ValueError(one.problem)
    received = _sent_back(jobs, weights, spread, bases, request, group)
    for name, one in solved.items():
        weight = weights[name]
        left, right = received.get(name, (None, None))
        assert one.fingerprint is not None
        yield name, _of_part(weight, spread[name][me], left, right, one, request), one.fingerprint


def _brought_together(
    jobs: dict[str, int], weights: dict[str, LocalWeight], spread: dict[str, list[Shard]], group: dist.ProcessGroup
) -> dict[str, Tensor]:
    """The whole weights that this rank is to compute."""
    me, transfer = group.rank(), Transfer(group)
    whole: dict[str, Tensor] = {}
    for name, solver in jobs.items():
        weight = weights[name]
        if isinstance(weight, ReplicatedWeight):
            if solver == me:
                whole[name] = weight.parameter.detach()
            continue
        if solver != me:
            values = weight.values().detach()
            for _, view in weight.shard.views(values):
                transfer.send(view, solver)
            continue
        tensor = whole[name] = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        for member, part in enumerate(spread[name]):
            for tile in part.rects:
                target = tensor[slice(*tile.rows), slice(*tile.cols)]
                if member != me:
                    transfer.receive(target, member)
        for tile, view in weight.shard.views(weight.values().detach()):
            tensor[slice(*tile.rows), slice(*tile.cols)] = view
    transfer.run()
    return whole


def _solve(name: str, weight: Tensor, request: Request, bases: dict[str, tuple[Tensor, Tensor]]) -> _Solved:
    check_basis_dtype(request.basis_dtype, weight.dtype, "basis_dtype")
    check_finite(weight, "weight")
    energy = 1.0
    if request.rank < min(weight.shape):
        spaces = top_subspaces(weight, request.rank)
        bases[name] = spaces.left.to(request.basis_dtype), spaces.right.to(request.basis_dtype)
        energy = spaces.energy
    # The dtype is one for all ranks, though each keeps only its part.
    return _Solved(Fingerprint.of(name, weight), energy, base_copy(weight).dtype)


def _sent_back(
    jobs: dict[str, int],
    weights: dict[str, LocalWeight],
    spread: dict[str, list[Shard]],
    bases: dict[str, tuple[Tensor, Tensor]],
    request: Request,
    group: dist.ProcessGroup,
) -> dict[str, tuple[Tensor, Tensor]]:
    """This rank's rows of U and V of every projected weight."""
    me, transfer = group.rank(), Transfer(group)
    received: dict[str, tuple[Tensor, Tensor]] = {}
    for name, solver in jobs.items():
        weight = weights[name]
        if request.rank >= min(weight.shape):
            continue
        if solver == me:
            left, right = bases[name]
            for member, part in enumerate(spread[name]):
                pieces = left[slice(*part.rows)], right[slice(*part.cols)]
                if member == me:
                    received[name] = pieces
                else:
                    transfer.send(pieces[0], member)
                    transfer.send(pieces[1], member)
        else:
            part = weight.shard
            sizes = part.rows[1] - part.rows[0], part.cols[1] - part.cols[0]
            rows, columns = (
                torch.empty((size, request.rank), dtype=request.basis_dtype, device=weight.device) for size in sizes
            )
            transfer.receive(rows, solver)
            transfer.receive(columns, solver)
            received[name] = rows, columns
    transfer.run()
    return received


@torch.no_grad()
def _of_part(
    weight: LocalWeight, part: Shard, left: Tensor | None, right: Tensor | None, solved: _Solved, request: Request
) -> Anchor:
    if part.numel:
        values = weight.values().detach()
    else:
        values = torch.empty(part.local_shape, dtype=weight.dtype, device=weight.device)
    base = block = arithmetic = None
    if left is not None and right is not None:
        left, right = padded(left), padded(right)
    if left is None or request.keep_base:
        base = values.to(solved.base_dtype, copy=True).contiguous()
    elif right is not None:
        block, arithmetic = computed_block(values, left, right, part)
    m, n = weight.shape
    return Anchor(
        left=left,
        right=right,
        base=base,
        block=block,
        shape=(m, n),
        weight_dtype=weight.dtype,
        rank=min(request.rank, m, n),
        energy=solved.energy,
        arithmetic=arithmetic,
        part=part,
    )
