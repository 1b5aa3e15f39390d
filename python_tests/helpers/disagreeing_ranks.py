"""The ranks' part in the tests of ranks that anchor different things."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import rpsft_kernels as rk
from exchange_ranks import CALLS, ODD, Outcome, attempt, layers, wrapped
from small_models import refused

_RIGHT: dict[str, Any] = {"rank": 8, "progress": False}


def anchor_differently(wrapper: str, odd: dict[str, Any]) -> tuple[str, int]:
    """Return the error where one rank calls from_model with other arguments, and the anchors of a right call then."""
    model = wrapped(wrapper, layers())
    arguments = _RIGHT | (odd if dist.get_rank() == ODD else {})
    message = refused(lambda: rk.Anchors.from_model(model, **arguments))
    return message, len(rk.Anchors.from_model(model, **_RIGHT))


def anchor_differently_in_two_groups() -> list[str]:
    """Weights over the two dimensions of a mesh: rank 0 shares no group with rank 3, which calls with another rank; and
    then, after a right call, has a weight of its own that is not finite.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    model = layers()
    for layer, places in zip(model, ([Shard(0), Replicate()], [Replicate(), Shard(0)], [Replicate()] * 2), strict=True):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, places))
    arguments = _RIGHT | ({"rank": 4} if dist.get_rank() == 3 else {})
    found = [refused(partial(rk.Anchors.from_model, model, **given)) for given in (arguments, _RIGHT)]
    if dist.get_rank() == 3:
        with torch.no_grad():
            model[2].weight.to_local().fill_(float("nan"))  # type: ignore[operator]
    return [*found, refused(partial(rk.Anchors.from_model, model, **_RIGHT))]


def anchor_zeros(rank: int) -> list[Outcome]:
    """One rank anchored its weights before their values were loaded; then a right call."""
    models = [layers().bfloat16(), layers().bfloat16()]
    if dist.get_rank() == ODD:
        for parameter in models[0].parameters():
            parameter.data.zero_()
    given, right = (rk.Anchors.from_model(model, rank, progress=False) for model in models)
    model = wrapped("fsdp2", layers().bfloat16())
    outcomes = [attempt(call, model, anchors) for anchors in (given, right) for call in CALLS.values()]
    return outcomes


def load_parts_of_two_saves(paths: list[str], rank: int) -> list[Outcome]:
    """Each rank loads its parts from another save of a folder for each model; then both from one."""
    for i, path in enumerate(paths):
        model = layers()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + i)
        rk.Anchors.from_model(wrapped("fsdp2", model), rank, progress=False).save(path)
    model = wrapped("fsdp2", layers())
    given, right = (rk.Anchors.load(path, model, verify=False) for path in (paths[dist.get_rank()], paths[0]))
    return [attempt(call, model, anchors) for anchors in (given, right) for call in CALLS.values()]
