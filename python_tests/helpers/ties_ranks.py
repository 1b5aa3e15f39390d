"""The ranks' part in the tests of ties that sharding has undone."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from small_models import refused


def _tied() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(8, 6), nn.Linear(6, 8, bias=False))
    model[1].weight = model[0].weight
    return model


def _refusals(model: nn.Module, anchors: rk.Anchors) -> list[str]:
    found = [
        refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0)),
        refused(lambda: rk.rotation_penalty(model, anchors)),
    ]
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def shard_apart() -> list[str]:
    """Shard embedding and head one by one, which makes two parameters of them."""
    model = _tied()
    anchors = rk.Anchors.from_model(model, 2, progress=False)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (model[0], model[1], model):
        fully_shard(module, mesh=mesh)
    return [*_refusals(model, anchors), refused(lambda: anchors.verify(model))]


def untie_on_one_rank() -> list[str]:
    """Untie the head on rank 1 alone: both ranks refuse, and neither waits."""
    model = _tied()
    wrapped = DistributedDataParallel(model)
    anchors = rk.Anchors.from_model(wrapped, 2, progress=False)
    if dist.get_rank() == 1:
        model[1].weight = nn.Parameter(model[0].weight.detach().clone())
    return _refusals(wrapped, anchors)
