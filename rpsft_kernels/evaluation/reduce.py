"""Sums of C and of R over the ranks of process groups, connected to the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed import FAILED, GroupCall, PendingSum
from .bucket import Bucket, ProjectedBucket
from .pairing import AnchoredWeight


class _AllReduce(torch.autograd.Function):
    """Replaces ``local`` by its sum over ranks. The gradient of ``local`` is that of the sum, times ``grad_scale``: a
    rank's shard of W reaches R through its own summand alone.
    """

    @staticmethod
    def forward(ctx: Any, local: Tensor, reduced: Tensor, grad_scale: float) -> Tensor:
        ctx.grad_scale = grad_scale
        return reduced.view_as(reduced)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.grad_scale, None, None


def _replace_by_sum(local: Tensor, reduced: Tensor, grad_scale: float) -> Tensor:
    result: Tensor = _AllReduce.apply(local, reduced, grad_scale)  # type: ignore[no-untyped-call, unused-ignore]
    return result


class _RefuseSecondDerivatives(torch.autograd.Function):
    """Returns R as it is; its backward pass refuses to be recorded.

    A recorded pass would take the sum of C for one that only this rank's shard reaches: the derivatives of the other
    ranks' gradients would be missing. Nothing of R's backward pass has run before this node.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor) -> Tensor:
        # No view: loss *= 0.1 and loss += task_loss change R where it lies.
        return total.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph: got create_graph=True for a rotation_penalty whose C is summed over ranks, expected a "
                "backward pass that is not differentiated again. R is quadratic, so that its Hessian's product with v "
                "needs no second derivative: it is R's gradient at W + v less that at W"
            )
        return grad


def refuse_second_derivatives(total: Tensor) -> Tensor:
    """Return R; its ``backward`` raises a ValueError for ``create_graph=True``."""
    result: Tensor = _RefuseSecondDerivatives.apply(total)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def flatten_drifts(projected: ProjectedBucket) -> None:
    """Lay a bucket's C one after the other, to be summed over ranks in one go."""
    projected.flat = torch.cat([drift.reshape(-1) for drift in projected.drifts])
    # The sum may be formed in place, because no earlier node of the graph has saved these numbers.
    projected.drifts = []


def start_drifts(projected: ProjectedBucket, group_call: GroupCall) -> None:
    """Start the sum of a bucket's C, laid one after the other, over the ranks of its group."""
    assert projected.flat is not None
    projected.pending = group_call.start(projected.flat.detach())


def stand_in(bucket: Bucket, weights: Sequence[AnchoredWeight]) -> ProjectedBucket:
    """Return what a rank that could not project a bucket sends in its place: the others wait for its sums, which tell
    them of it.
    """
    first = weights[bucket.members[0]].weight
    squares = torch.full((1,), FAILED, dtype=ops.accumulation_dtype(first.dtype), device=first.device)
    flat = None
    if bucket.summed:
        flat = squares.new_zeros(sum(weights[i].anchor.rank ** 2 for i in bucket.members))
    return ProjectedBucket(bucket, [], squares, flat)


@dataclass
class GroupReduction:
    """The sums of one process group, started and not yet finished.

    Attributes:
        group_call: carries the sums.
        members: the buckets whose weights lie in the group.
        grad_scale: multiplies the gradient of a rank's own summand.
        local: R of the weights that a rank works on alone; None if there are none.
        scalars: ``local``, followed by one number of each rank, finite if that rank's weights are; summed over ranks.
        pending: the sum of ``scalars``.
    """

    group_call: GroupCall
    members: list[ProjectedBucket]
    grad_scale: float
    local: Tensor | None
    scalars: Tensor
    pending: PendingSum

    @classmethod
    def start(
        cls,
        group_call: GroupCall,
        members: list[ProjectedBucket],
        shared: Sequence[ProjectedBucket],
        weights: Sequence[AnchoredWeight],
    ) -> GroupReduction:
        """Start the sums.

        Args:
            group_call: carries them.
            members: the buckets whose weights lie in the group.
            shared: all buckets that this rank shares with others, so that each of its groups learns of its NaN.
            weights: the weights of the call.
        """
        own = [projected.squares.sum() for projected in members if projected.pending is None]
        dtype = max((projected.squares.dtype for projected in members), key=lambda dtype: dtype.itemsize)
        scalars = torch.zeros(1 + group_call.size, dtype=dtype, device=group_call.device)
        local = None
        if own:
            local = torch.stack(own).to(group_call.device, dtype).sum()
            scalars[0] = local.detach()
        sums = [projected.squares.detach().sum().to(group_call.device, dtype) for projected in shared]
        scalars[1 + group_call.rank] = torch.stack(sums).sum()
        return cls(
            group_call=group_call,
            members=members,
            grad_scale=weights[members[0].bucket.members[0]].weight.grad_scale,
            local=local,
            scalars=scalars,
            pending=group_call.start(scalars),
        )

    def finish(self) -> None:
        """Wait for the sums."""
        for projected in self.members:
            if projected.pending is not None:
                self.group_call.finish(projected.pending)
        self.group_call.finish(self.pending)

    def check_health(self) -> None:
        """Raise a ValueError unless every rank's weights are finite."""
        self.group_call.check_health(self.scalars[1:].tolist())

    def summands(self, weights: Sequence[AnchoredWeight]) -> list[Tensor]:
        """Return R of the group's weights, in summands; store the sums of C as the drifts of ``members``."""
        first = self.scalars[0]
        summands = [first if self.local is None else _replace_by_sum(self.local, first, self.grad_scale)]
        for projected in self.members:
            if projected.pending is None or projected.flat is None:
                continue
            reduced = _replace_by_sum(projected.flat, projected.pending.tensor, self.grad_scale)
            summands.append(reduced.square().sum())
            anchor_ranks = [weights[i].anchor.rank for i in projected.bucket.members]
            drifts = torch.split(reduced.detach(), [rank * rank for rank in anchor_ranks])
            projected.drifts = [drift.view(rank, rank) for drift, rank in zip(drifts, anchor_ranks, strict=True)]
        return summands
