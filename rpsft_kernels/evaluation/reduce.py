"""Sums of C and of R over the ranks of process groups, and their place in the autograd graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributed import GroupCall, PendingSum
from .bucket import Projected
from .pairing import AnchoredWeight


class _AllReduce(torch.autograd.Function):
    """``local`` replaced by its sum over ranks. Its gradient is the sum's, times ``grad_scale``: each rank's shard of W
    reaches R through its own summand alone."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, reduced: Tensor, grad_scale: float) -> Tensor:
        ctx.grad_scale = grad_scale
        return reduced.view_as(reduced)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.grad_scale, None, None


def _all_reduced(local: Tensor, reduced: Tensor, grad_scale: float) -> Tensor:
    result: Tensor = _AllReduce.apply(local, reduced, grad_scale)  # type: ignore[no-untyped-call, unused-ignore]
    return result


def start_drifts(projected: Projected, group_call: GroupCall) -> None:
    """Begin to sum a bucket's C over the ranks of its group."""
    projected.flat = torch.cat([drift.reshape(-1) for drift in projected.drifts])
    # Summed in place: nothing before it in the graph needs these numbers.
    projected.drifts = []
    projected.pending = group_call.start(projected.flat.detach())


@dataclass
class GroupReduction:
    """The sums of one process group on their way.

    Attributes:
        members: the buckets whose weights lie in the group.
        local: R of the weights that each rank computes whole, where there are any.
        scalars: summed over ranks: ``local``, then a number of each rank that is finite where its weights are.
    """

    group_call: GroupCall
    members: list[Projected]
    grad_scale: float
    local: Tensor | None
    scalars: Tensor
    pending: PendingSum

    @classmethod
    def start(
        cls,
        group_call: GroupCall,
        members: list[Projected],
        everything: Sequence[Projected],
        weights: Sequence[AnchoredWeight],
    ) -> GroupReduction:
        """Begin to sum. ``everything``: all that this rank shares with others, so that every group of a rank hears of
        its NaN.
        """
        own = [each.squares.sum() for each in members if each.pending is None]
        dtype = max((each.squares.dtype for each in members), key=lambda dtype: dtype.itemsize)
        scalars = torch.zeros(1 + group_call.size, dtype=dtype, device=group_call.device)
        local = None
        if own:
            local = torch.stack(own).to(group_call.device, dtype).sum()
            scalars[0] = local.detach()
        seen = [each.squares.detach().sum().to(group_call.device, dtype) for each in everything]
        scalars[1 + group_call.rank] = torch.stack(seen).sum()
        grad_scale = weights[members[0].bucket.members[0]].weight.grad_scale
        return cls(group_call, members, grad_scale, local, scalars, group_call.start(scalars))

    def finish(self) -> None:
        """Wait for the sums."""
        for each in self.members:
            if each.pending is not None:
                self.group_call.finish(each.pending)
        self.group_call.finish(self.pending)

    def check_health(self) -> None:
        """Raise a ValueError unless every rank's weights are finite."""
        self.group_call.check_health(self.scalars[1:].tolist())

    def summands(self, weights: Sequence[AnchoredWeight]) -> list[Tensor]:
        """R of the group's weights, in summands; the drifts of ``members`` become the sums over ranks."""
        first = self.scalars[0]
        found = [first if self.local is None else _all_reduced(self.local, first, self.grad_scale)]
        for each in self.members:
            if each.pending is None or each.flat is None:
                continue
            reduced = _all_reduced(each.flat, each.pending.tensor, self.grad_scale)
            found.append(reduced.square().sum())
            ranks = [weights[i].anchor.rank for i in each.bucket.members]
            pieces = torch.split(reduced.detach(), [rank * rank for rank in ranks])
            each.drifts = [piece.view(rank, rank) for piece, rank in zip(pieces, ranks, strict=True)]
        return found
