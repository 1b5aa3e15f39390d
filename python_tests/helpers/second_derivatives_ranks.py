"""The ranks' part in the tests of second derivatives."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import rpsft_kernels as rk
from small_models import refused
from support import random_matrix


def differentiate_twice(rank: int) -> tuple[str, float, list[float]]:
    """Return the error of a product with R's second derivatives, its distance from that of one process, and, as two
    numbers, whether a gradient is there and the sum of the one that a usual backward pass then makes.
    """
    pretrained, direction = random_matrix(8, 6, seed=1), random_matrix(8, 6, seed=2)
    anchor = rk.Anchor.from_weight(pretrained, rank, basis_dtype=torch.float32)
    whole = (pretrained + direction).requires_grad_()
    expected = _multiply(whole, anchor, direction)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(0)]))
    assert isinstance(weight, DTensor)
    along = distribute_tensor(direction, mesh, [Shard(0)])
    distance = 0.0
    message = refused(lambda: rk.rotation_penalty([weight], [anchor]).backward(create_graph=True))
    made = float(weight.grad is not None)
    if message == "accepted":
        weight.grad = None
        found = _multiply(weight, anchor, along)
        distance = float((found.full_tensor() - expected).abs().max())  # type: ignore[attr-defined]
    weight.grad = None
    rk.rotation_penalty([weight], [anchor]).backward()
    return message, distance, [made, float(weight.grad.full_tensor().sum())]  # type: ignore[union-attr]


def change_penalty_in_place() -> list[float]:
    """Return the sums of the gradients of ``0.5 * R + 1`` over shards, computed in place and not."""
    pretrained, moved = random_matrix(8, 6, seed=1), random_matrix(8, 6, seed=2)
    anchor = rk.Anchor.from_weight(pretrained, 3, basis_dtype=torch.float32)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = nn.Parameter(distribute_tensor(pretrained + moved, mesh, [Shard(0)]))
    sums = []
    for in_place in (True, False):
        loss = rk.rotation_penalty([weight], [anchor])
        if in_place:
            loss *= 0.5
            loss += 1.0
        else:
            loss = 0.5 * loss + 1.0
        loss.backward()
        sums.append(float(weight.grad.full_tensor().sum()))  # type: ignore[union-attr]
        weight.grad = None
    return sums


def _multiply(weight: torch.Tensor, anchor: rk.Anchor, direction: torch.Tensor) -> torch.Tensor:
    (gradient,) = torch.autograd.grad(rk.rotation_penalty([weight], [anchor]), weight, create_graph=True)
    along = (gradient * direction).sum()
    (product,) = torch.autograd.grad(along, weight)
    return product
