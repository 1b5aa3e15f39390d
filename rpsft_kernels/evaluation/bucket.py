"""Buckets of a call: weights of one form, dtype, device and process group, projected and pulled back together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..distributed import ReplicatedWeight
from .pairing import AnchoredWeight, Matrix
from .projection import ProjectionFunction, gather_replicas


class BucketTensors(NamedTuple):
    """A bucket's tensors in one call.

    Attributes:
        values: each busy weight's shard.
        joint: an empty tensor that ties replicas together in the graph; None if nothing has to.
        operands: the matrices of all busy weights, with their anchors' tensors.
    """

    values: list[Tensor]
    joint: Tensor | None
    operands: ops.Operands


@dataclass
class Bucket:
    """Places of some of a call's weights, and how this process computes them.

    Attributes:
        place: of the bucket among the plan's.
        members: places of the weights in the call.
        backend: the name of the backend that computes the bucket.
        device: where the weights are.
        group_name: the process group of the weights, "" for none.
        summed: whether C is summed over the ranks of the group.
        full: whether the anchors are full.
        busy: places of the weights that this process works on; another one computes C and norms of the others.
        counts: for each busy weight, the number of matrices that make up its shard.
        plain: whether each busy weight is one matrix that fits its anchor's tensors as they are.
        program: index of the plan's program that computes the bucket. None under a graph compiler and for tensors
            without memory (fake ones, say), which take the torch operators.
        batch: place of the bucket in its program.
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

    def gather(self, weights: Sequence[AnchoredWeight]) -> BucketTensors:
        """Collect the tensors of this call; autograd connects them to the weights if gradients are on."""
        busy = [weights[i] for i in self.busy]
        values, joint = self._values(weights)
        if self.plain:
            return BucketTensors(values, joint, _plain_operands(busy, values))
        matrices = [matrix for anchored, value in zip(busy, values, strict=True) for matrix in anchored.matrices(value)]
        return BucketTensors(values, joint, _operands_of_matrices(matrices))

    def _values(self, weights: Sequence[AnchoredWeight]) -> tuple[list[Tensor], Tensor | None]:
        """Return the busy weights' shards, and the empty summand of the norms that ties replicas together."""
        if self.group_name and torch.is_grad_enabled():
            members = [weights[i].weight for i in self.members]
            if isinstance(members[0], ReplicatedWeight) and any(weight.requires_grad for weight in members):
                joint, shards = gather_replicas(members)
                values = dict(zip(self.members, shards, strict=True))
                return [values[i] for i in self.busy], joint
        return [weights[i].weight.values() for i in self.busy], None

    def project(
        self,
        program: ops.Program | None,
        run: ops.Run | None,
        tensors: BucketTensors,
        weights: Sequence[AnchoredWeight],
    ) -> ProjectedBucket:
        """Compute C (k, k) of each weight's shard, and the squared norms of the busy ones (for full anchors, those of
        W - W0).

        C is (0, 0) where it is not needed: for full anchors, and for weights that another process works on alone.

        Args:
            program: the plan's program of this bucket.
            run: the call's run of it, in which the projection is staged.
            tensors: what :meth:`gather` has collected.
            weights: the weights of the call.
        """
        operands, values = tensors.operands, tensors.values
        first = weights[self.members[0]].weight
        dtype = ops.accumulation_dtype(first.dtype)
        no_drift = torch.empty((0, 0), dtype=dtype, device=first.device)
        if not operands.weights:
            drifts: list[Tensor] = []
            squares = no_drift.new_zeros(0)
        elif run is None or program is None:
            drifts, squares = ops.project_drift(operands, self.backend)
        elif torch.is_grad_enabled() and any(matrix.requires_grad for matrix in operands.weights):
            squares, *drifts = ProjectionFunction.apply(  # type: ignore[no-untyped-call, unused-ignore]
                program, run, self.batch, self.backend, operands, *operands.weights
            )
            drifts = drifts or [no_drift] * len(operands.weights)
        else:
            drifts, squares = run.project(self.batch), run.squares_of(self.batch)
        if not self.plain:
            drifts, squares = self._add_up(drifts, squares, values, weights)
        if len(self.busy) < len(self.members):
            own = dict(zip(self.busy, drifts, strict=True))
            drifts = [own.get(i, no_drift) for i in self.members]
        if tensors.joint is not None:
            squares = torch.cat([squares, tensors.joint])
        return ProjectedBucket(self, drifts, squares)

    def _add_up(
        self,
        matrix_drifts: Sequence[Tensor],
        matrix_squares: Tensor,
        values: Sequence[Tensor],
        weights: Sequence[AnchoredWeight],
    ) -> tuple[list[Tensor], Tensor]:
        """Add up C and norms of each shard's matrices, in their order; a shard may have any number of them, or none."""
        drifts, squares, first = [], [], 0
        for i, count, value in zip(self.busy, self.counts, values, strict=True):
            anchor, summed = weights[i].anchor, weights[i].summed
            own = matrix_drifts[first : first + count]
            # An empty shard adds 0 but keeps the autograd edge, so that its (empty) gradient exists.
            drift = own[0] if own else matrix_squares.new_zeros((anchor.rank,) * 2 if summed else (0, 0)) + value.sum()
            for other in own[1:]:
                drift = drift + other
            if anchor.block is not None and own:
                drift = drift - anchor.block
            drifts.append(drift)
            if self.full:
                square = matrix_squares[first : first + count].sum() + (0 if own else value.sum())
            else:
                square = drift.square().sum()
            squares.append(square)
            first += count
        return drifts, torch.stack(squares) if squares else matrix_squares.new_zeros(0)


@dataclass
class ProjectedBucket:
    """A bucket with its C and squared norms.

    Attributes:
        bucket: the bucket.
        drifts: C of each of its members; empty while ``flat`` is summed.
        squares: the squared norms of the busy weights.
        flat: all C, one after the other, to be summed over ranks in one go.
        pending: the sum of ``flat``.
    """

    bucket: Bucket
    drifts: list[Tensor]
    squares: Tensor
    flat: Tensor | None = None
    pending: Any = None


def _plain_operands(weights: Sequence[AnchoredWeight], values: list[Tensor]) -> ops.Operands:
    anchors = [weight.anchor for weight in weights]
    if not anchors:
        return ops.Operands()
    # All anchors of a bucket have the same tensors as its first one.
    first = anchors[0]
    return ops.Operands(
        values,
        [] if first.left is None else [anchor.left for anchor in anchors],  # type: ignore[misc]
        [] if first.right is None else [anchor.right for anchor in anchors],  # type: ignore[misc]
        [] if first.base is None else [anchor.base for anchor in anchors],  # type: ignore[misc]
        [] if first.block is None else [anchor.block for anchor in anchors],  # type: ignore[misc]
    )


def _operands_of_matrices(matrices: Sequence[Matrix]) -> ops.Operands:
    """Make operands of the matrices of several shards, without B: that is subtracted from the sum of a shard's C."""
    return ops.Operands(
        [m.values for m in matrices],
        [m.left for m in matrices if m.left is not None],
        [m.right for m in matrices if m.right is not None],
        [m.base for m in matrices if m.base is not None],
    )


def _specify(anchored: AnchoredWeight) -> ops.WeightSpec:
    # It depends on facts of the whole weight alone, which every rank shares, so that all ranks form the same buckets;
    # and not on the gradient, so that R is summed in one order, with the same bits, whichever call computes it.
    anchor, weight = anchored.anchor, anchored.weight
    left, (rows, cols) = anchor.left, weight.shape
    key = (
        weight.device.type if weight.group is not None else weight.device,
        weight.dtype,
        None if anchor.base is None else anchor.base.dtype,
        None if left is None else left.dtype,
        anchor.block is not None,
        weight.group_name,
        anchored.summed,
    )
    if left is None:
        return ops.WeightSpec(rows, cols, 0, key)
    parts = ops.intermediate_parts(anchor.block is None, left.dtype == torch.bfloat16)
    return ops.WeightSpec(rows, cols, anchor.rank, key, parts)


def make_buckets(weights: Sequence[AnchoredWeight]) -> list[Bucket]:
    """Sort a call's weights into buckets, each with the backend in force.

    Raises:
        ValueError: the requested backend cannot serve a device or dtype.
    """
    device_types = [anchored.weight.device.type for anchored in weights]
    limits = ops.limits_of(device_types, any(anchored.summed for anchored in weights))
    planned = ops.plan_buckets([_specify(anchored) for anchored in weights], limits)
    return [_make_bucket(weights, place, members) for place, members in enumerate(planned)]


def _make_bucket(weights: Sequence[AnchoredWeight], place: int, members: list[int]) -> Bucket:
    first = weights[members[0]]
    busy = [i for i in members if weights[i].weight.shard.numel or not weights[i].weight.shard.unsharded]
    return Bucket(
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
