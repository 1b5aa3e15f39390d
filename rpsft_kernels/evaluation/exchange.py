"""Brings replicas to the same values again, of which each rank has changed its own share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import GroupCall, ReplicatedWeight, Shard
from .pairing import AnchoredWeight


def exchange_shares(members: Sequence[AnchoredWeight], group_call: GroupCall) -> None:
    """Give every rank of a group the shares that the others have changed; bit for bit, whatever computed them.

    Each rank sends its share of the weights once, one weight after the other. Every rank makes this call with the same
    weights.

    Raises:
        RuntimeError: the group failed. Replicas differ then.
    """
    divided = [w for w in members if isinstance(w.weight, ReplicatedWeight) and w.weight.divided]
    if not divided:
        return
    shards = _gather_shards(divided, group_call)
    sent: list[tuple[dist.Work, Tensor | None, Tensor]] = []
    try:
        for anchored, by_rank in zip(divided, shards, strict=True):
            parameter = anchored.weight.parameter.detach()
            for rank, shard in enumerate(by_rank):
                if not shard.numel:
                    continue
                view = shard.of(parameter)
                carried = view.contiguous()
                source = dist.get_global_rank(group_call.group, rank)
                # Backends differ in the dtypes that they send, but all of them send bytes.
                content = carried.view(-1).view(torch.uint8)
                work = dist.broadcast(content, src=source, group=group_call.group, async_op=True)
                sent.append((work, None if rank == group_call.rank or carried is view else carried, view))
            # The copies of one weight are freed before those of the next are made.
            for work, received, target in sent:
                work.wait()
                if received is not None:
                    target.copy_(received)
            sent.clear()
    except RuntimeError as error:
        raise RuntimeError(
            f"rotation penalty: replicas of the corrected weights could not be exchanged between {group_call.size} "
            f"ranks, and may differ now: go back to the last checkpoint. The process group said: {error}"
        ) from error


def _gather_shards(members: Sequence[AnchoredWeight], group_call: GroupCall) -> list[list[Shard]]:
    """Return the shard of each weight on every rank."""
    table = torch.zeros(len(members), group_call.size, 4, dtype=torch.int64, device="cpu")
    for i, anchored in enumerate(members):
        shard = anchored.weight.shard
        table[i, group_call.rank] = torch.tensor([*shard.rows, *shard.cols], device="cpu")
    rows = group_call.finish(group_call.start(table.to(group_call.device))).tolist()
    return [
        [Shard.rectangle(anchored.weight.shard.shape, (r[0], r[1]), (r[2], r[3])) for r in of_weight]
        for anchored, of_weight in zip(members, rows, strict=True)
    ]
