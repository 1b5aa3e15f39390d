"""The ranks' part in the tests of FSDP2."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

import rpsft_kernels as rk
from llama import (
    COEFF,
    RANK,
    distance,
    drift,
    errors,
    expected_with,
    llama,
    own_batch,
    task_loss,
    train_alone,
    whole_anchors,
)
from small_models import refused


def wrapped(
    model: Any,
    dim: int = 0,
    reshard: bool = True,
    mixed: bool = False,
    mesh_shape: tuple[int, ...] = (),
    compiled: bool = False,
    checkpointed: bool = False,
) -> Any:
    shape = mesh_shape or (dist.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicas", "shards")[-len(shape) :])
    options: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": reshard}
    if dim:
        options["shard_placement_fn"] = lambda parameter: _shard(parameter, dim, shape[-1])
    if mixed:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in model.model.layers:
        if compiled:
            layer.mlp.compile(backend="aot_eager")
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def _shard(parameter: nn.Parameter, dim: int, size: int) -> Shard | None:
    # FSDP2 cuts only rows unevenly.
    return Shard(dim) if parameter.ndim > dim and parameter.shape[dim] % size == 0 else None


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in parameters(model) if p.grad is not None}  # type: ignore[attr-defined]


def parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        yield name.replace("_orig_mod.", ""), parameter


def compare(
    sharded_anchors: bool, dtype: torch.dtype, anchor_options: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Compare both calls on a drifted model with float64; returns the facts that tests check."""
    model = llama(dtype)
    anchors = whole_anchors(model, **anchor_options)
    moved = llama(dtype)
    drift(moved)
    penalty, wanted = expected_with(anchor_options, model, moved)
    model = wrapped(model, **options)
    if sharded_anchors:
        anchors = rk.Anchors.from_model(model, RANK, progress=False, **{"basis_dtype": torch.float32, **anchor_options})
    result: dict[str, Any] = {"at anchor": rk.rotation_penalty(model, anchors).item(), "bytes": anchors.nbytes}
    anchors_verified = True
    if sharded_anchors:
        anchors.verify(model)
    with torch.no_grad():
        whole = dict(moved.named_parameters())
        for name, parameter in parameters(model):
            assert isinstance(parameter, DTensor)
            other = torch.distributed.tensor.distribute_tensor(
                whole[name].detach(),
                parameter.device_mesh,
                [Shard(p.dim) if p.is_shard() else p for p in parameter.placements],
            )
            parameter.copy_(other)
    if sharded_anchors:
        anchors_verified = "got other values" in refused(lambda: anchors.verify(model))
    loss = task_loss(model, own_batch()) * 0
    penalties = [rk.rotation_penalty(model, anchors)]
    (loss + COEFF * penalties[0]).backward()
    wanted = {name: COEFF * g for name, g in wanted.items()}
    result["autograd"] = errors(gradients(model), wanted)
    bits = [penalties[0].item(), *(float(g.sum()) for g in gradients(model).values())]
    penalties.append(rk.accumulate_rotation_grad_(model, anchors, COEFF))
    result["twice"] = errors(gradients(model), {name: 2 * g for name, g in wanted.items()})
    model.zero_grad()
    penalties.append(rk.accumulate_rotation_grad_(model, anchors, COEFF))
    result["accumulated"] = errors(gradients(model), wanted)
    result["penalty"] = max(abs(p.item() / penalty - 1) for p in penalties)
    result["bits"] = bits
    result["verified"] = anchors_verified
    return result


def train(steps: int, accumulate: bool, **options: Any) -> float:
    """Return the distance of a sharded run from the unsharded one."""
    alone = train_alone(steps, accumulate)
    model = wrapped(llama(), **options)
    anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = task_loss(model, own_batch())
        if accumulate:
            loss.backward()
            rk.accumulate_rotation_grad_(model, anchors, COEFF)
        else:
            (loss + COEFF * rk.rotation_penalty(model, anchors)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e6)
        optimizer.step()
        optimizer.zero_grad()
    return distance({n: p.full_tensor().detach() for n, p in parameters(model)}, alone)  # type: ignore[attr-defined]
