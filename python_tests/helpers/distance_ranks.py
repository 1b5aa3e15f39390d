"""The ranks' part in the tests of weights that are far from W0."""

from __future__ import annotations

import warnings

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import rpsft_kernels as rk
from exchange_ranks import CALLS, Outcome, attempt
from support import random_matrix


class _Sharded(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def use_a_far_shard(odd: int) -> list[Outcome]:
    """One rank has the rows of another model. Warnings are errors; each call is made twice."""
    pretrained = random_matrix(8, 6, seed=1)
    moved = pretrained.clone()
    moved[4 * odd : 4 * odd + 4] = random_matrix(4, 6, seed=2)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = _Sharded(nn.Parameter(distribute_tensor(moved, mesh, [Shard(0)])))
    outcomes = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for call in CALLS.values():
            anchors = {"weight": rk.Anchor.from_weight(pretrained, 3)}
            outcomes += [attempt(call, model, anchors), attempt(call, model, anchors)]
    return outcomes
