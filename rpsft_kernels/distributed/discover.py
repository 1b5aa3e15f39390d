"""Finds every parameter of a model by canonical name, and how it lies over the processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter

from ..private_names import (
    Zero3Parameter,
    averaging_group,
    count_averaged_by_ddp,
    is_fsdp1_flat,
    is_linked_by_deepspeed,
    replicated_by_ddp,
    skips_unused,
)
from .dtensor import gathered_by_fsdp2, is_dtensor, locate_dtensor
from .fsdp1 import find_flat_parameters
from .names import canonical_name, is_deepspeed, named_weights
from .shard import Shard
from .weight import LocalWeight, ReplicatedWeight
from .zero3 import locate_zero3
from .zero_replica import ZeroReplica

# Takes a parameter and its name, for messages.
_Locate = Callable[[Tensor, str], LocalWeight]


@dataclass(frozen=True)
class ParameterRef:
    """One parameter as a whole, and ``locate``, which finds the shard of a 2-D one that lies here."""

    identity: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    parameter: Tensor
    locate: Callable[[str], LocalWeight]


def locate_tensor(tensor: Tensor, name: str) -> LocalWeight:
    """Locate the shard of a tensor that comes without a model: the whole of it, unless it is a DTensor."""
    if is_dtensor(tensor):
        return locate_dtensor(tensor, name)
    shape = tuple(tensor.shape)
    return LocalWeight(tensor, shape, Shard.whole(shape))  # type: ignore[arg-type]


def find_parameters(model: nn.Module) -> dict[str, ParameterRef]:
    """Find every parameter by canonical name; a tied one under each of its names.

    Raises:
        ValueError: ``model`` is not a module, or two different parameters have one canonical name.
    """
    visible = named_weights(model)
    flattened = {canonical_name(path): _refer_to_flat(weight) for path, weight in find_flat_parameters(model)}
    sharded_by_visible: dict[int, Tensor] = {id(shown): sharded for shown, sharded in gathered_by_fsdp2(model)}
    locate_replicas = _find_replicas(model)
    refs = {}
    for name, parameter in visible.items():
        if name in flattened or is_fsdp1_flat(parameter):
            continue
        tensor = sharded_by_visible.get(id(parameter), parameter)
        locate = locate_tensor if is_dtensor(tensor) else locate_replicas.get(id(tensor), locate_tensor)
        refs[name] = _refer_to(tensor, locate)
    refs.update(flattened)
    return refs


def _refer_to_flat(weight: LocalWeight) -> ParameterRef:
    return ParameterRef(weight.identity, weight.shape, weight.dtype, weight.parameter, lambda name: weight)


def _refer_to(tensor: Tensor, locate: _Locate) -> ParameterRef:
    zero3 = Zero3Parameter.of(tensor)
    if zero3 is not None:
        return ParameterRef(id(tensor), zero3.shape, tensor.dtype, tensor, lambda name: locate_zero3(zero3))
    # A lazy parameter has no shape yet, and a nested one none of numbers.
    shape = () if isinstance(tensor, UninitializedParameter) or tensor.is_nested else tuple(tensor.shape)
    return ParameterRef(id(tensor), shape, tensor.dtype, tensor, lambda name: locate(tensor, name))


def _find_replicas(model: nn.Module) -> dict[int, _Locate]:
    """Return, by its id, the function that locates each parameter that DDP or DeepSpeed ZeRO-1/2 replicates."""
    locate_by_id: dict[int, _Locate] = {}
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            # Not those that have come since: no rank's copy of them is averaged.
            replicated = replicated_by_ddp(module)
            # A weight outlives no module, and plans must keep none alive.
            reference = weakref.ref(module)
            locate = _replica_locator(
                module.process_group,
                work_error=_reason_unaveraged(module),
                replicas=partial(_find_averaged, reference),
                reason_lost=partial(_reason_lost, reference),
            )
        elif is_deepspeed(module) and module.zero_optimization_stage() < 3:  # type: ignore[operator]
            # Experts are averaged over other groups: each rank does all of their work.
            replicated = _averaged_by_deepspeed(module)
            locate = _deepspeed_locator(module)
        else:
            continue
        if locate is not None:
            locate_by_id.update((id(parameter), locate) for parameter in replicated)
    return locate_by_id


def _averaged_by_deepspeed(engine: Any) -> list[Tensor]:
    return [p for p in engine.module.parameters() if getattr(p, "allreduce", True)]


def _find_averaged_by_deepspeed(engine: weakref.ref[Any]) -> list[Tensor]:
    wrapped = engine()
    return [] if wrapped is None else _averaged_by_deepspeed(wrapped)


def _gradient_error(engine: Any) -> str:
    """Say why gradients of an engine cannot be added to; "" where its optimizer reads .grad, as ZeRO-0's does."""
    if engine.zero_optimization_stage() == 0:
        if not engine.fp16_enabled():
            return ""
        return (
            "got a parameter of a DeepSpeed engine with fp16, whose gradient is multiplied by a loss scale until the "
            "step, expected one that can be added to; put rotation_penalty into the loss of engine.backward"
        )
    return (
        f"got a parameter whose gradient DeepSpeed ZeRO-{engine.zero_optimization_stage()} keeps to itself, expected "
        "one that can be added to; put rotation_penalty into the loss of engine.backward"
    )


def _reason_unaveraged(module: DistributedDataParallel) -> str:
    """Say why replicas may have gradients that are not averaged; "" where all that require grad are."""
    trained = sum(parameter.requires_grad for parameter in replicated_by_ddp(module))
    averaged = count_averaged_by_ddp(module) if trained else 0
    if trained <= averaged:
        return ""
    return (
        f"model: got {trained} parameters under DistributedDataParallel that require grad, expected the {averaged} "
        "that did when it was made: it does not average the gradients of the others, so that each rank would keep its "
        "own share; wrap the model again once requires_grad is set"
    )


def _find_averaged(module: weakref.ref[DistributedDataParallel]) -> list[Tensor]:
    wrapped = module()
    return [] if wrapped is None else replicated_by_ddp(wrapped)


def _reason_lost(module: weakref.ref[DistributedDataParallel]) -> str:
    wrapped = module()
    option = "" if wrapped is None else skips_unused(wrapped)
    if not option:
        return ""
    return (
        f"got a parameter under DistributedDataParallel({option}=True), expected one whose gradient it always "
        "averages: of a weight that no forward pass uses it leaves each rank its own share. Wrap the model without "
        f"{option}; or put rotation_penalty into the loss; or pass the wrapped module (model.module) with anchors of "
        "that: each rank then does all of the work, before or after the backward pass"
    )


def _replica_locator(group: Any, **facts: Any) -> _Locate | None:
    """Make the function that locates a replica of ``group``, which has these facts as attributes; None where the group
    has one rank only.
    """
    return None if group.size() == 1 else partial(_locate_replica, ReplicatedWeight, group, facts)


def _deepspeed_locator(engine: Any) -> _Locate:
    reference, group = weakref.ref(engine), averaging_group(engine)
    facts: dict[str, Any] = {
        "gradient_error": _gradient_error(engine),
        "replicas": partial(_find_averaged_by_deepspeed, reference),
        "engine": reference,
    }
    locate = partial(_locate_replica, ZeroReplica, None if group.size() == 1 else group, facts)

    def locate_here(tensor: Tensor, name: str) -> LocalWeight:
        # One rank has all masters of these.
        return locate(tensor, name) if is_linked_by_deepspeed(tensor) else locate_tensor(tensor, name)

    return locate_here if group.size() == 1 else locate


def _locate_replica(
    kind: type[ReplicatedWeight], group: Any, facts: dict[str, Any], tensor: Tensor, name: str
) -> LocalWeight:
    shape = tuple(tensor.shape)
    return kind(tensor, shape, Shard.whole(shape), group, **facts)  # type: ignore[arg-type]
