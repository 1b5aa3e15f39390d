"""Every parameter of a model by canonical name, and how it lies over the processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ..private_names import Zero3Parameter, averaging_group, ignored_by_ddp, is_fsdp1_flat
from .dtensor import gathered_by_fsdp2, is_dtensor, locate_dtensor
from .fsdp1 import find_flat_parameters
from .names import canonical_name, is_deepspeed, named_weights
from .shard import Shard
from .weight import LocalWeight, ReplicatedWeight
from .zero3 import locate_zero3


@dataclass(frozen=True)
class ParameterRef:
    """One parameter as a whole, and ``locate``, which finds the shard of a 2-D one that lies here."""

    identity: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: Tensor
    locate: Callable[[str], LocalWeight]


def locate_tensor(tensor: Tensor, name: str) -> LocalWeight:
    """A tensor that comes without a model: whole, or a DTensor."""
    if is_dtensor(tensor):
        return locate_dtensor(tensor, name)
    shape = tuple(tensor.shape)
    return LocalWeight(tensor, shape, Shard.whole(shape))  # type: ignore[arg-type]


def find_parameters(model: nn.Module) -> dict[str, ParameterRef]:
    """Every parameter by canonical name; a tied one under each of its names.

    Raises:
        ValueError: ``model`` is not a module, or two different parameters have one canonical name.
    """
    visible = named_weights(model)
    flattened = {
        canonical_name(path): ParameterRef(weight.identity, shape, weight.dtype, weight.parameter, _always(weight))
        for path, shape, weight in find_flat_parameters(model)
    }
    sharded_by_visible: dict[int, Tensor] = {id(shown): sharded for shown, sharded in gathered_by_fsdp2(model)}
    replicas = _replicas(model)
    refs = {}
    for name, parameter in visible.items():
        if name in flattened or is_fsdp1_flat(parameter):
            continue
        tensor = sharded_by_visible.get(id(parameter), parameter)
        locate = replicas.get(id(tensor), locate_tensor) if not is_dtensor(tensor) else locate_tensor
        refs[name] = _reference(tensor, locate)
    refs.update(flattened)
    return refs


def _always(weight: LocalWeight) -> Callable[[str], LocalWeight]:
    return lambda name: weight


def _reference(tensor: Tensor, locate: Callable[[Tensor, str], LocalWeight]) -> ParameterRef:
    zero3 = Zero3Parameter.of(tensor)
    if zero3 is not None:
        return ParameterRef(id(tensor), zero3.shape, tensor.dtype, tensor, lambda name: locate_zero3(zero3))
    # A lazy parameter has no shape yet.
    shape = () if isinstance(tensor, UninitializedParameter) else tuple(tensor.shape)
    return ParameterRef(id(tensor), shape, tensor.dtype, tensor, lambda name: locate(tensor, name))


def _replicas(model: nn.Module) -> dict[int, Callable[[Tensor, str], LocalWeight]]:
    """By id, how to locate each parameter that DistributedDataParallel or DeepSpeed ZeRO-1/2 replicate."""
    located: dict[int, Callable[[Tensor, str], LocalWeight]] = {}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            ignored = ignored_by_ddp(module)
            replica = _replica_of(module.process_group)
            kept = [p for name, p in module.module.named_parameters() if name not in ignored]
        elif is_deepspeed(module) and module.zero_optimization_stage() < 3:  # type: ignore[operator]
            replica = _replica_of(averaging_group(module), _gradient_error(module))
            # Experts are averaged over other groups: each rank does all of their work.
            kept = [p for p in module.module.parameters() if getattr(p, "allreduce", True)]  # type: ignore[union-attr]
        else:
            continue
        if replica is not None:
            located.update((id(parameter), replica) for parameter in kept)
    return located


def _gradient_error(engine: Any) -> str:
    return (
        f"got a parameter whose gradient DeepSpeed ZeRO-{engine.zero_optimization_stage()} keeps to itself, expected "
        "one that can be added to; put rotation_penalty into the loss of engine.backward"
    )


def _replica_of(group: Any, gradient_error: str = "") -> Callable[[Tensor, str], LocalWeight] | None:
    """How to locate the replicas of ``group``; None where it has one rank only."""
    if group.size() == 1:
        return None

    def locate(tensor: Tensor, name: str) -> LocalWeight:
        shape = tuple(tensor.shape)
        return ReplicatedWeight(tensor, shape, Shard.whole(shape), group, gradient_error=gradient_error)  # type: ignore[arg-type]

    return locate
