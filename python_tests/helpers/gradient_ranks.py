"""The ranks' part in the tests of gradients that share memory."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from small_models import refused
from support import random_matrix

_SHAPE = (256, 8)


class _Weights(nn.Module):
    def __init__(self, *weights: Tensor) -> None:
        super().__init__()
        self.weights = nn.ParameterList(map(nn.Parameter, weights))

    def forward(self, factor: Tensor) -> Tensor:
        return sum((weight * factor).sum() for weight in self.weights)  # type: ignore[return-value]


def _values() -> tuple[list[Tensor], list[rk.Anchor]]:
    values, anchors = [], []
    for i in range(2):
        pretrained = random_matrix(*_SHAPE, torch.float32, seed=2 * i)
        values.append(pretrained + 0.1 * random_matrix(*_SHAPE, torch.float32, seed=2 * i + 1))
        anchors.append(rk.Anchor.from_weight(pretrained, 3, basis_dtype=torch.float32))
    return values, anchors


def _alone() -> list[Tensor]:
    """Return the gradients, on ones, of weights that lie on one rank."""
    values, anchors = _values()
    weights = [value.requires_grad_() for value in values]
    for weight in weights:
        weight.grad = torch.ones(_SHAPE)
    rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    return [weight.grad for weight in weights if weight.grad is not None]


def sharded() -> dict[str, Any]:
    """Accumulate into gradients of DTensors that overlap themselves, then each other on rank 1 alone."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values, anchors = _values()
    weights = [distribute_tensor(value, mesh, [Shard(0)]).requires_grad_() for value in values]
    for weight in weights:
        weight.grad = DTensor.from_local(torch.ones(1, 1).expand(_SHAPE[0] // 2, _SHAPE[1]), mesh, [Shard(0)])
    assert weights[0].grad.to_local().stride() == (0, 0)  # type: ignore[union-attr]
    rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    errors = [
        float((weight.grad.full_tensor() - wanted).norm() / (wanted - 1).norm())  # type: ignore[union-attr]
        for weight, wanted in zip(weights, _alone(), strict=True)
    ]
    local = torch.ones(_SHAPE[0] // 2, _SHAPE[1])
    others = [local, local if dist.get_rank() == 1 else local.clone()]
    for weight, other in zip(weights, others, strict=True):
        weight.grad = DTensor.from_local(other, mesh, [Shard(0)])
    message = refused(lambda: rk.accumulate_rotation_grad_(weights, anchors, 0.5))
    return {"errors": errors, "message": message, "unchanged": all(bool(other.eq(1).all()) for other in others)}


def replicated() -> list[float]:
    """Accumulate into overlapping gradients before the backward pass that averages them."""
    values, anchors = _values()
    model = DistributedDataParallel(_Weights(*values))
    named = {f"weights.{i}": anchor for i, anchor in enumerate(anchors)}
    for parameter in model.parameters():
        # The last column of a row is the first of the next. Ranks have 0.5 and 1.5, which are 1 on average.
        memory = torch.full((_SHAPE[0] * 7 + 1,), 0.5 + dist.get_rank())
        parameter.grad = memory.as_strided(_SHAPE, (7, 1))
    rk.accumulate_rotation_grad_(model, named, 0.5)
    model(torch.zeros(_SHAPE)).backward()
    return [
        float((parameter.grad - wanted).norm() / (wanted - 1).norm())  # type: ignore[operator]
        for parameter, wanted in zip(model.parameters(), _alone(), strict=True)
    ]
