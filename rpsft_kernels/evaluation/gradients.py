"""The gradients that a call adds to: which exist, which are made, and which go through one launch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .bucket import Bucket, Gathered
from .pairing import AnchoredWeight


class AlikeGradients(NamedTuple):
    """Weights of a bucket whose gradients are of one dtype and are all new or all there already.

    Attributes:
        weights: places in the call; ``grads``: what each one's gradient was given as.
        members: of each of their matrices, its place among the bucket's.
        owners: of each matrix, the place of its weight among ``Bucket.members``.
        operands, targets, scales: of each matrix.
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
        """Stage it; ``drifts``: C of each of ``Bucket.members``, or None for those that a projection leaves."""
        given = None if drifts is None else [drifts[i] for i in self.owners]
        return run.stage_pull_back(
            bucket.batch, self.members, self.operands, self.targets, self.scales, self.accumulate, given
        )


class Gradients:
    """The gradients of one call, by bucket. Those that it has made go again where the call fails."""

    def __init__(self, weights: Sequence[AnchoredWeight], coeff: float, tied: bool) -> None:
        self._weights, self._coeff, self._tied = weights, coeff, tied
        self._made: list[int] = []
        # Identities of weights that an earlier launch of this call gives a gradient.
        self._given: set[int] = set()

    def are_copies(self, bucket: Bucket) -> bool:
        """Whether a bucket's gradients are copies, to be taken one launch at a time."""
        return any(self._weights[i].weight.copies_gradient for i in bucket.busy)

    def pull_backs(self, bucket: Bucket, gathered: Gathered) -> Iterator[AlikeGradients]:
        """What computes a bucket's gradients, in order; makes those that do not exist. To be called for the buckets in
        the order in which they are pulled back.
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
        for kind in self._kinds(wanted):
            yield self._pull_back(bucket, gathered, places, *kind)

    def drop_made(self) -> None:
        """Take the gradients away that this call has made: none of them was computed."""
        for i in self._made:
            self._weights[i].weight.drop_gradient()

    def keep_made(self, computed: Sequence[int] | None = None) -> None:
        """Those of the weights at these places are computed; None: all are."""
        self._made = [] if computed is None else [i for i in self._made if i not in computed]

    def _ensure(self, i: int) -> None:
        weight = self._weights[i].weight
        if weight.parameter.grad is None:
            weight.ensure_gradient()
            if weight.parameter.grad is not None:
                self._made.append(i)

    def _kinds(self, wanted: list[tuple[int, range]]) -> Iterator[tuple[list[tuple[int, range]], bool]]:
        """Weights for one launch each, and whether their gradients exist."""
        while wanted:
            chosen, left = wanted, []
            if self._tied:
                # A weight that is listed twice has one gradient, which no launch may write twice.
                firsts: dict[int, int] = {}
                for i, _ in wanted:
                    firsts.setdefault(self._weights[i].weight.identity, i)
                chosen = [each for each in wanted if firsts[self._weights[each[0]].weight.identity] == each[0]]
                left = [each for each in wanted if each not in chosen]
            kinds: dict[tuple[bool, torch.dtype], list[tuple[int, range]]] = {}
            for each in chosen:
                weight = self._weights[each[0]].weight
                exists = weight.must_accumulate or (self._tied and weight.identity in self._given)
                kinds.setdefault((exists, weight.gradient_dtype), []).append(each)
            for (exists, _), alike in kinds.items():
                yield alike, exists
            if self._tied:
                self._given |= {self._weights[i].weight.identity for i, _ in chosen}
            wanted = left

    def _pull_back(
        self,
        bucket: Bucket,
        gathered: Gathered,
        places: dict[int, int],
        chosen: list[tuple[int, range]],
        accumulate: bool,
    ) -> AlikeGradients:
        indices = [i for i, _ in chosen]
        members = [j for _, matrices in chosen for j in matrices]
        grads = [self._gradient(i) for i in indices]
        operands = gathered.operands.for_pull_back()
        if len(members) < bucket.matrices:
            operands = operands.pick(members)
        if bucket.plain:
            owners, targets = [places[i] for i in indices], grads
            scales = [2.0 * self._coeff * self._weights[i].weight.grad_scale for i in indices]
        else:
            owners, targets, scales = [], [], []
            for (i, matrices), grad in zip(chosen, grads, strict=True):
                found = self._weights[i].matrices(grad)
                targets += [matrix.values for matrix in found]
                owners += [places[i]] * len(matrices)
                scales += [2.0 * self._coeff * self._weights[i].weight.grad_scale] * len(matrices)
        return AlikeGradients(indices, grads, members, owners, operands, targets, scales, accumulate)

    def _gradient(self, i: int) -> Tensor:
        weight = self._weights[i].weight
        made = weight.parameter.grad is None
        found = weight.gradient()
        if made:
            self._made.append(i)
        return found
