"""Weights of one form, dtype, device and group, which go through the two operations together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..distributed import ReplicatedWeight
from .pairing import AnchoredWeight, Matrix
from .projection import ProjectionFunction, gather_replicas

# On the CPU nothing is gained by many weights in one call but the calls' own cost, which matters for small weights at
# small ranks. The backward pass holds the gradients of a bucket. What travels between processes is better sent in few
# pieces.
CPU_LIMITS = ops.BucketLimits(weights=8, drift_bytes=1 << 20, elements=16 << 20, one_orientation=False)
CPU_LIMITS_OF_SHARDS = ops.BucketLimits(weights=8, drift_bytes=16 << 20, one_orientation=False)


class Gathered(NamedTuple):
    """A bucket's tensors of one call.

    Attributes:
        values: each busy weight's shard.
        joint: what ties replicas together in the graph, where something must.
        operands: the matrices of all busy weights, with their anchors' tensors.
    """

    values: list[Tensor]
    joint: Tensor | None
    operands: ops.Operands


@dataclass
class Bucket:
    """Which weights, by their places in the call, and how they are computed.

    Attributes:
        busy: places of the weights that have work here; others' C and norms are another process's.
        counts: of each busy weight, how many matrices make up its shard.
        plain: each of them is one matrix, and its anchor's tensors are read as they are.
        place: among the plan's buckets.
        program, batch: what computes it, by its place in the plan, and its place there. None under a graph compiler and
            for tensors without memory (fake ones, say), which take the torch operators.
    """

    place: int
    members: list[int]
    backend: str
    device: torch.device
    group_name: str
    summed: bool
    full: bool
    busy: list[int]
    counts: list[int]
    plain: bool
    program: int | None = None
    batch: int = 0

    @property
    def matrices(self) -> int:
        return sum(self.counts)

    def gather(self, weights: Sequence[AnchoredWeight]) -> Gathered:
        """The tensors of this call, connected to the weights by autograd where gradients are on."""
        busy = [weights[i] for i in self.busy]
        values, joint = self._values(weights)
        if self.plain:
            return Gathered(values, joint, _plain_operands(busy, values))
        found = [matrix for each, value in zip(busy, values, strict=True) for matrix in each.matrices(value)]
        return Gathered(values, joint, operands_of(found))

    def _values(self, weights: Sequence[AnchoredWeight]) -> tuple[list[Tensor], Tensor | None]:
        """The busy weights' shards. Replicas are tied together in the graph, by an empty summand of the norms."""
        if self.group_name and torch.is_grad_enabled():
            members = [weights[i].weight for i in self.members]
            if isinstance(members[0], ReplicatedWeight) and any(weight.requires_grad for weight in members):
                joint, shown = gather_replicas(members)
                values = dict(zip(self.members, shown, strict=True))
                return [values[i] for i in self.busy], joint
        return [weights[i].weight.values() for i in self.busy], None

    def project(
        self, program: ops.Program | None, run: ops.Run | None, gathered: Gathered, weights: Sequence[AnchoredWeight]
    ) -> Projected:
        """C (k, k) of each weight's shard, and the squared norms of the busy ones (of full anchors: of W - W0).

        C is (0, 0) where it is not needed: of full anchors, and of weights that another process works on alone.
        """
        operands, values = gathered.operands, gathered.values
        first = weights[self.members[0]].weight
        dtype = ops.accumulation_dtype(first.dtype)
        nothing = torch.empty((0, 0), dtype=dtype, device=first.device)
        if not operands.weights:
            drifts: list[Tensor] = []
            squares = nothing.new_zeros(0)
        elif run is None or program is None:
            drifts, squares = ops.project_drift(operands, self.backend)
        elif torch.is_grad_enabled() and any(matrix.requires_grad for matrix in operands.weights):
            squares, *drifts = ProjectionFunction.apply(  # type: ignore[no-untyped-call, unused-ignore]
                program, run, self.batch, self.backend, operands, *operands.weights
            )
            drifts = drifts or [nothing] * len(operands.weights)
        else:
            drifts, squares = run.project(self.batch), run.squares_of(self.batch)
        if not self.plain:
            drifts, squares = self._add_up(drifts, squares, values, weights, dtype)
        if len(self.busy) < len(self.members):
            own = dict(zip(self.busy, drifts, strict=True))
            drifts = [own.get(i, nothing) for i in self.members]
        if gathered.joint is not None:
            squares = torch.cat([squares, gathered.joint])
        return Projected(self, drifts, squares)

    def _add_up(
        self,
        found: Sequence[Tensor],
        seen: Tensor,
        values: Sequence[Tensor],
        weights: Sequence[AnchoredWeight],
        dtype: torch.dtype,
    ) -> tuple[list[Tensor], Tensor]:
        """C and norms of shards that are no rectangles or empty: matrix by matrix, then added in their order."""
        drifts, squares, at = [], [], 0
        for i, count, value in zip(self.busy, self.counts, values, strict=True):
            anchor, summed = weights[i].anchor, weights[i].summed
            own = found[at : at + count]
            # An empty shard adds 0 but keeps the autograd edge, so that its (empty) gradient exists.
            drift = own[0] if own else seen.new_zeros((anchor.rank,) * 2 if summed else (0, 0)) + value.sum()
            for other in own[1:]:
                drift = drift + other
            if anchor.block is not None and own:
                drift = drift - anchor.block
            drifts.append(drift)
            norm = seen[at : at + count].sum() + (0 if own else value.sum()) if self.full else drift.square().sum()
            squares.append(norm)
            at += count
        return drifts, torch.stack(squares) if squares else seen.new_zeros(0)


@dataclass
class Projected:
    """A bucket's C and squared norms. ``flat`` holds all C behind each other while they are summed over ranks."""

    bucket: Bucket
    drifts: list[Tensor]
    squares: Tensor
    flat: Tensor | None = None
    pending: Any = None


def _plain_operands(weights: Sequence[AnchoredWeight], values: list[Tensor]) -> ops.Operands:
    anchors = [weight.anchor for weight in weights]
    if not anchors:
        return ops.Operands()
    first = anchors[0]
    # Forms are equal within a bucket.
    return ops.Operands(
        values,
        [] if first.left is None else [anchor.left for anchor in anchors],  # type: ignore[misc]
        [] if first.right is None else [anchor.right for anchor in anchors],  # type: ignore[misc]
        [] if first.base is None else [anchor.base for anchor in anchors],  # type: ignore[misc]
        [] if first.block is None else [anchor.block for anchor in anchors],  # type: ignore[misc]
    )


def operands_of(matrices: Sequence[Matrix]) -> ops.Operands:
    """The operands of matrices that are parts of shards: B is subtracted from the sum of their C, not here."""
    return ops.Operands(
        [m.values for m in matrices],
        [m.left for m in matrices if m.left is not None],
        [m.right for m in matrices if m.right is not None],
        [m.base for m in matrices if m.base is not None],
    )


def _specification(one: AnchoredWeight) -> ops.WeightSpec:
    # Only facts of the whole weight that every rank shares, so that all ranks form the same buckets; and none of its
    # gradient, so that R is summed in one order, with the same bits, whichever call computes it.
    anchor, weight = one.anchor, one.weight
    left, (rows, cols) = anchor.left, weight.shape
    key = (
        weight.device.type if weight.group is not None else weight.device,
        weight.dtype,
        None if anchor.base is None else anchor.base.dtype,
        None if left is None else left.dtype,
        anchor.block is not None,
        weight.group_name,
        one.summed,
    )
    if left is None:
        return ops.WeightSpec(rows, cols, 0, key)
    parts = 1 if anchor.block is None and left.dtype == torch.bfloat16 else 3
    return ops.WeightSpec(rows, cols, anchor.rank, key, parts)


def make_buckets(weights: Sequence[AnchoredWeight]) -> list[Bucket]:
    """The buckets of a call, each with the backend in force.

    Raises:
        ValueError: the requested backend cannot serve a device or dtype.
    """
    limits = None
    if all(one.weight.device.type == "cpu" for one in weights):
        limits = CPU_LIMITS_OF_SHARDS if any(one.summed for one in weights) else CPU_LIMITS
    return list(_make(weights, ops.plan_buckets([_specification(one) for one in weights], limits)))


def _make(weights: Sequence[AnchoredWeight], planned: Sequence[list[int]]) -> Iterator[Bucket]:
    for place, members in enumerate(planned):
        first = weights[members[0]]
        busy = [i for i in members if weights[i].weight.shard.numel or not weights[i].weight.shard.unsharded]
        yield Bucket(
            place=place,
            members=members,
            backend=ops.resolve_backend(first.weight.device, first.weight.dtype),
            device=first.weight.device,
            group_name=first.weight.group_name,
            summed=first.summed,
            full=first.anchor.form == "full",
            busy=busy,
            counts=[len(weights[i].weight.shard.rects) for i in busy],
            plain=all(weights[i].is_one_matrix for i in busy),
        )
