"""The norm of the task's gradient over the weights that R acts on, as one number on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import LocalWeight, ReplicatedWeight
from .watched import gradient_of


def square_gradients(weights: Sequence[LocalWeight]) -> Tensor | None:
    """Return ``||g||^2`` of the gradients that the weights have now, a float32 scalar on a device of theirs.

    Gradients of shards are summed over their group; those of replicas, which may not be averaged yet, are averaged as
    squares. Nothing waits for the device. Every rank makes this call.

    Returns:
        None if there is no gradient, and all weights lie whole on this process.
    """
    total: Tensor | None = None
    groups: dict[str, list[LocalWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.group_name, []).append(weight)
    for name, members in groups.items():
        gradients = {id(g): _local(g) for g in map(gradient_of, members) if g is not None}
        squares = _squares(list(gradients.values()))
        if name:
            squares = _sum_over_group(squares, members[0])
        if squares is not None:
            total = squares if total is None else total + squares.to(total.device)
    return total


def _local(gradient: Tensor) -> Tensor:
    """Return the part of a gradient that lies here."""
    local: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient  # type: ignore[operator]
    return local.detach().coalesce().values() if local.layout == torch.sparse_coo else local.detach()


def _squares(gradients: Sequence[Tensor]) -> Tensor | None:
    """Return the sum of all squares in float32, on the first gradient's device; None if there is nothing to sum."""
    devices: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel():
            devices.setdefault(gradient.device, []).append(gradient)
    sums = []
    for members in devices.values():
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in members]
        sums.append(torch.stack(norms).square().sum())
    return torch.stack([each.to(sums[0].device) for each in sums]).sum() if sums else None


def _sum_over_group(squares: Tensor | None, weight: LocalWeight) -> Tensor:
    """Sum over the shards of a group, or average over its replicas."""
    assert weight.group is not None
    own = torch.zeros((), device=weight.device) if squares is None else squares.to(weight.device)
    dist.all_reduce(own, group=weight.group)
    return own / weight.group.size() if isinstance(weight, ReplicatedWeight) else own
