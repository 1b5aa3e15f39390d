"""The norm of the task's gradient over the weights that R acts on, as one number on every rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import LocalWeight, ReplicatedWeight
from ..distributed.dtensor import is_dtensor
from .watched import gradient_of


def square_gradients(weights: Sequence[LocalWeight]) -> Tensor | None:
    """Return ``||g||^2`` of the gradients that the weights have now, a float32 scalar on a device of theirs.

    Gradients of shards are summed over their group; those of replicas, which may not be averaged yet, are averaged as
    squares. Nothing waits for the device. Every rank makes this call.

    Returns:
        None if there is no gradient. Of FSDP1's flat shards, which other ranks may have gradients of, 0.
    """
    total: Tensor | None = None
    found = False
    groups: dict[str, list[LocalWeight]] = {}
    for weight in weights:
        groups.setdefault(weight.group_name, []).append(weight)
    for name, members in groups.items():
        gradients = {id(g): _local(g) for g in map(gradient_of, members) if g is not None}
        found |= bool(gradients) or not all(_is_alike(member) for member in members)
        squares = _squares(list(gradients.values()))
        if name:
            squares = _sum_over_group(squares, members[0])
        if squares is not None:
            total = squares if total is None else total + squares.to(total.device)
    return total if found else None


def _is_alike(weight: LocalWeight) -> bool:
    """Whether all ranks have a gradient of the weight if one has."""
    return weight.group is None or isinstance(weight, ReplicatedWeight) or is_dtensor(weight.parameter)


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
        norms = [_norm(gradient) for gradient in members]
        sums.append(torch.stack(norms).square().sum())
    return torch.stack([each.to(sums[0].device) for each in sums]).sum() if sums else None


def _norm(gradient: Tensor) -> Tensor:
    """Return the norm in float32; torch refuses to narrow float64 within it."""
    dtype = None if gradient.dtype == torch.float64 else torch.float32
    norm: Tensor = torch.linalg.vector_norm(gradient, dtype=dtype)
    return norm.to(torch.float32)


def _sum_over_group(squares: Tensor | None, weight: LocalWeight) -> Tensor:
    """Sum over the shards of a group, or average over its replicas."""
    assert weight.group is not None
    own = torch.zeros((), device=weight.device) if squares is None else squares.to(weight.device)
    dist.all_reduce(own, group=weight.group)
    return own / weight.group.size() if isinstance(weight, ReplicatedWeight) else own
