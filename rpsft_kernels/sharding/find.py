"""Every parameter of a model by canonical name, and how it lies over the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ..names import canonical_name, is_deepspeed, named_weights
from .dtensor import gathered_by_fsdp2, is_dtensor, locate_dtensor
from .flat import find_flat_parameters, is_zero3, locate_zero3
from .part import Part
from .weight import LocalWeight, ReplicatedWeight


@dataclass(frozen=True)
class Found:
    """One parameter: what the whole is like, and how to reach what of it lies here (2-D ones alone)."""

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
    return LocalWeight(tensor, shape, Part.whole(shape))  # type: ignore[arg-type]


def find_parameters(model: nn.Module) -> dict[str, Found]:
    """Every parameter by canonical name; a tied one under each of its names.

    Raises:
        ValueError: ``model`` is not a module, or two different parameters have one canonical name.
    """
    shown_now = named_weights(model)
    flattened = {
        canonical_name(path): Found(weight.identity, shape, weight.dtype, weight.parameter, _always(weight))
        for path, shape, weight in find_flat_parameters(model)
    }
    behind: dict[int, Tensor] = {id(shown): held for shown, held in gathered_by_fsdp2(model)}
    replicas = _replicas(model)
    found = {}
    for name, parameter in shown_now.items():
        if name in flattened or getattr(parameter, "_is_flat_param", False):
            continue
        tensor = behind.get(id(parameter), parameter)
        locate = replicas.get(id(tensor), locate_tensor) if not is_dtensor(tensor) else locate_tensor
        found[name] = _found(tensor, locate)
    found.update(flattened)
    return found


def _always(weight: LocalWeight) -> Callable[[str], LocalWeight]:
    return lambda name: weight


def _found(tensor: Tensor, locate: Callable[[Tensor, str], LocalWeight]) -> Found:
    if is_zero3(tensor):
        shape = tuple(tensor.ds_shape)  # type: ignore[attr-defined]
        return Found(id(tensor), shape, tensor.dtype, tensor, lambda name: locate_zero3(tensor, name))
    # A lazy parameter has no shape yet.
    shape = () if isinstance(tensor, UninitializedParameter) else tuple(tensor.shape)
    return Found(id(tensor), shape, tensor.dtype, tensor, lambda name: locate(tensor, name))


def _replicas(model: nn.Module) -> dict[int, Callable[[Tensor, str], LocalWeight]]:
    """How to locate the parameters that DistributedDataParallel keeps equal on several ranks."""
    located: dict[int, Callable[[Tensor, str], LocalWeight]] = {}
    for module in model.modules():
        if is_deepspeed(module) and module.zero_optimization_stage() < 3:  # type: ignore[operator]
            located.update(_zero_replicas(module))
        if not isinstance(module, DistributedDataParallel) or module.process_group.size() == 1:
            continue
        for name, parameter in module.module.named_parameters():
            if name not in module.parameters_to_ignore:
                located[id(parameter)] = _replica_of(module)
    return located


def _replica_of(wrapper: Any) -> Callable[[Tensor, str], LocalWeight]:
    def locate(tensor: Tensor, name: str) -> LocalWeight:
        shape = tuple(tensor.shape)
        return ReplicatedWeight(
            tensor,
            shape,
            Part.whole(shape),  # type: ignore[arg-type]
            wrapper.process_group,
        )

    return locate


def _zero_replicas(engine: Any) -> Iterator[tuple[int, Callable[[Tensor, str], LocalWeight]]]:
    group = engine.data_parallel_group

    def locate(tensor: Tensor, name: str) -> LocalWeight:
        shape = tuple(tensor.shape)
        return ReplicatedWeight(
            tensor,
            shape,
            Part.whole(shape),  # type: ignore[arg-type]
            group,
            unreachable=(
                f"got a parameter whose gradient DeepSpeed ZeRO-{engine.zero_optimization_stage()} keeps to itself, "
                "expected one that can be added to; put rotation_penalty into the loss of engine.backward"
            ),
        )

    for parameter in engine.module.parameters():
        # Experts are averaged over other groups: each rank does all of their work.
        if group.size() > 1 and getattr(parameter, "allreduce", True):
            yield id(parameter), locate
