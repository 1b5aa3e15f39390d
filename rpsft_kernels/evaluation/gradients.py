"""Gradients that a call adds to: it takes those that exist, makes the others, and sorts them into pull-backs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..distributed import ReplicatedWeight
from .bucket import Bucket, BucketTensors
from .gradient_memory import GradientMemory
from .pairing import AnchoredWeight


class PullBack(NamedTuple):
    """Weights of a bucket that are pulled back together: their gradients have one dtype, and all exist or all are new.

    Attributes:
        weights: places of the weights in the call.
        grads: their gradients, as :meth:`LocalWeight.gradient` returned them.
        members: for each matrix of these weights, its place among the bucket's matrices.
        owners: for each matrix, the place of its weight among ``Bucket.members``.
        operands: the matrices' operands.
        targets: for each matrix, the view of its weight's gradient that it is added to or written over.
        scales: for each matrix, the factor of its pull-back.
        accumulate: whether the gradients exist and are added to.
    """

    weights: list[int]
    grads: list[Tensor]
    members: list[int]
    owners: list[int]
    operands: ops.Operands
    targets: list[Tensor]
    scales: list[float]
    accumulate: bool

    def stage(self, run: ops.Run, bucket: Bucket, drifts: Sequence[Tensor] | None) -> Any:
        """Stage the pull-back in a run; returns what its ``pull_back_`` takes.

        Args:
            run: the call's run of the bucket's program.
            bucket: the bucket of the weights.
            drifts: C of each of ``Bucket.members``; None takes those that the bucket's projection leaves in the run.
        """
        return run.stage_pull_back(
            bucket.batch,
            self.members,
            self.operands,
            grads=self.targets,
            scales=self.scales,
            accumulate=self.accumulate,
            drifts=None if drifts is None else [drifts[i] for i in self.owners],
        )


class Gradients:
    """The gradients of one call, by bucket. Gradients that it has made are removed again if the call fails.

    Args:
        weights: the weights of the call.
        coeff: the factor of R in the objective.
        tied: whether one and the same weight is listed twice.
    """

    def __init__(self, weights: Sequence[AnchoredWeight], coeff: float, tied: bool) -> None:
        self._weights, self._coeff, self._tied = weights, coeff, tied
        self._made: list[int] = []
        self._memory = GradientMemory(weights)
        # Identities of weights whose gradient an earlier pull-back of this call computes.
        self._pulled: set[int] = set()

    def are_copies(self, bucket: Bucket) -> bool:
        """Whether a bucket's gradients are copies, of which only one pull-back's are held at a time."""
        return any(self._weights[i].weight.copies_gradient for i in bucket.busy)

    def pull_backs(self, bucket: Bucket, tensors: BucketTensors) -> Iterator[PullBack]:
        """Yield a bucket's pull-backs in order, and make the gradients that do not exist.

        It has to be called for the buckets in the order in which they are pulled back.

        Raises:
            ValueError: the bucket's backend cannot add to a gradient's dtype.
        """
        wanted, first = [], 0
        for i, count in zip(bucket.busy, bucket.counts, strict=True):
            weight = self._weights[i].weight
            if weight.requires_grad and count:
                wanted.append((i, range(first, first + count)))
            elif weight.requires_grad:
                self._ensure(i)
            first += count
        for i in bucket.members:
            if i not in bucket.busy and self._weights[i].weight.requires_grad:
                self._ensure(i)
        places = {i: place for place, i in enumerate(bucket.members)}
        for chosen, accumulate in self._split(wanted):
            anchored = self._weights[chosen[0][0]]
            dtype, name = anchored.weight.gradient_dtype, f"{anchored.name}.grad"
            ops.check_gradient_dtype(bucket.backend, dtype, anchored.weight.dtype, name)
            yield self._make_pull_back(bucket, tensors, places, chosen, accumulate)

    def check_memory(self, plan: object) -> None:
        """Raise a ValueError if two gradients that exist share memory; ``plan`` is that of the call."""
        self._memory.check(plan)

    def drop_made(self) -> None:
        """Remove the gradients that this call has made and not computed, and put back those that it has replaced."""
        for i in self._made:
            self._weights[i].weight.drop_gradient()
        self._memory.restore()

    def keep_made(self, computed: Sequence[int] | None = None) -> None:
        """Keep the gradients of the weights at these places, which are computed now; None keeps all."""
        self._memory.keep(computed)
        self._made = [] if computed is None else [i for i in self._made if i not in computed]

    def _ensure(self, i: int) -> None:
        weight = self._weights[i].weight
        if weight.parameter.grad is None:
            weight.ensure_gradient()
            if weight.parameter.grad is not None:
                self._made.append(i)
        elif isinstance(weight, ReplicatedWeight):
            # What other ranks add comes with the average.
            self._memory.add([i], [weight.parameter.grad], sharded=True)

    def _split(self, wanted: list[tuple[int, range]]) -> Iterator[tuple[list[tuple[int, range]], bool]]:
        """Split weights, each with the range of its matrices, into pull-backs; yields whether their gradients exist."""
        while wanted:
            chosen, rest = wanted, []
            if self._tied:
                # A weight that is listed twice has one gradient, which no pull-back may write twice.
                firsts: dict[int, int] = {}
                for i, _ in wanted:
                    firsts.setdefault(self._weights[i].weight.identity, i)
                chosen = [entry for entry in wanted if firsts[self._weights[entry[0]].weight.identity] == entry[0]]
                rest = [entry for entry in wanted if entry not in chosen]
            kinds: dict[tuple[bool, torch.dtype], list[tuple[int, range]]] = {}
            for entry in chosen:
                weight = self._weights[entry[0]].weight
                exists = weight.must_accumulate or (self._tied and weight.identity in self._pulled)
                kinds.setdefault((exists, weight.gradient_dtype), []).append(entry)
            for (exists, _), entries in kinds.items():
                yield entries, exists
            if self._tied:
                self._pulled |= {self._weights[i].weight.identity for i, _ in chosen}
            wanted = rest

    def _make_pull_back(
        self,
        bucket: Bucket,
        tensors: BucketTensors,
        places: dict[int, int],
        chosen: list[tuple[int, range]],
        accumulate: bool,
    ) -> PullBack:
        indices = [i for i, _ in chosen]
        members = [j for _, matrices in chosen for j in matrices]
        grads = [self._take_gradient(i) for i in indices]
        if accumulate:
            grads = self._memory.add(indices, grads, bool(bucket.group_name))
        operands = tensors.operands.for_pull_back()
        if len(members) < bucket.matrices:
            operands = operands.pick(members)
        if bucket.plain:
            owners, targets = [places[i] for i in indices], grads
            scales = [2.0 * self._coeff * self._weights[i].weight.grad_scale for i in indices]
        else:
            owners, targets, scales = [], [], []
            for (i, matrices), grad in zip(chosen, grads, strict=True):
                targets += [matrix.values for matrix in self._weights[i].matrices(grad)]
                owners += [places[i]] * len(matrices)
                scales += [2.0 * self._coeff * self._weights[i].weight.grad_scale] * len(matrices)
        return PullBack(
            weights=indices,
            grads=grads,
            members=members,
            owners=owners,
            operands=operands,
            targets=targets,
            scales=scales,
            accumulate=accumulate,
        )

    def _take_gradient(self, i: int) -> Tensor:
        weight = self._weights[i].weight
        made = weight.parameter.grad is None
        gradient = weight.gradient()
        if made:
            self._made.append(i)
        return gradient
