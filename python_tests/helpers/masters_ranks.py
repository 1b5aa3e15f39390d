"""The ranks' part in the tests of parameters that are masters of what the forward pass computes with."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import rpsft_kernels as rk
from support import exact_penalty, random_matrix


def penalties_under_mixed_precision() -> list[float]:
    """Return errors of R around a step of FSDP2 in bfloat16, of drifts that bfloat16 would round away."""
    model = nn.Sequential(nn.Linear(48, 32, bias=False), nn.Linear(32, 48, bias=False))
    with torch.no_grad():
        for seed, layer in enumerate(model):
            layer.weight.copy_(random_matrix(*layer.weight.shape, torch.bfloat16, seed=seed))
    anchors = rk.Anchors.from_model(model, 8, progress=False, basis_dtype=torch.float32)
    with torch.no_grad():
        for layer in model:
            layer.weight.mul_(1 + 1e-4)
    expected = sum(float(exact_penalty(model.get_parameter(name), anchor)) for name, anchor in anchors.items())
    rounded = sum(
        float(exact_penalty(model.get_parameter(name).bfloat16(), anchor)) for name, anchor in anchors.items()
    )
    assert expected > 0 == rounded
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    found = [rk.rotation_penalty(model, anchors)]
    output = model(torch.ones(2, 48))
    assert output.dtype == torch.bfloat16
    found.append(rk.rotation_penalty(model, anchors))
    (output.float().square().mean() + found[-1]).backward()
    found.append(rk.accumulate_rotation_grad_(model, anchors, 0.1))
    return [abs(value.item() / expected - 1) for value in found]
