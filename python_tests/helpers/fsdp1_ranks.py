"""The ranks' part in the tests of FSDP1."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

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
    model: nn.Module,
    strategy: str = "FULL_SHARD",
    use_orig_params: bool = True,
    low_precision: bool = False,
    frozen: tuple[str, ...] = (),
) -> Any:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    options: dict[str, Any] = {}
    if strategy == "HYBRID_SHARD":
        options["device_mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    if low_precision:
        # Gradients stay in bfloat16 beside parameters in float32.
        options["mixed_precision"] = MixedPrecision(param_dtype=torch.bfloat16, keep_low_precision_grads=True)
    return FullyShardedDataParallel(
        model,
        sharding_strategy=ShardingStrategy[strategy],
        auto_wrap_policy=functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={LlamaDecoderLayer}),
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        **options,
    )


def clean(name: str) -> str:
    return name.replace("_fsdp_wrapped_module.", "")


def gradients(model: Any) -> dict[str, Tensor]:
    """Return whole gradients: FSDP1's own where it can give them, else put together from every rank's."""
    if model._use_orig_params and model.mixed_precision.param_dtype is None:
        with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
            return {clean(n): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    found = {}
    for path, module in model.named_modules():
        handle = getattr(module, "_handle", None)
        if handle is None:
            continue
        flat = handle.flat_param
        own = flat.grad
        if model._use_orig_params:
            own = torch.zeros_like(flat)
            for info, original in zip(flat._shard_param_infos, flat._params, strict=True):
                if original.grad is not None:
                    assert original.grad.dtype == torch.bfloat16
                    own[info.offset_in_shard :][: info.numel_in_shard] = original.grad
        if own is None:
            continue
        shards = [own.detach()]
        if handle.uses_sharded_strategy:
            shards = [torch.empty_like(own) for _ in range(handle.process_group.size())]
            dist.all_gather(shards, own.detach(), group=handle.process_group)
        prefix = clean(path + "." if path else "")
        pieces = torch.cat(shards)[: sum(flat._numels_with_padding)].split(flat._numels_with_padding)
        real = [piece for piece, padding in zip(pieces, flat._is_padding_mask, strict=True) if not padding]
        for name, shape, piece in zip(flat._fqns, flat._shapes, real, strict=True):
            found[prefix + name] = piece.view(shape)
    return found


def move(model: Any, moved: nn.Module) -> None:
    """Give a wrapped model the values of an unwrapped one."""
    whole = dict(moved.named_parameters())
    with torch.no_grad(), FullyShardedDataParallel.summon_full_params(model):
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[clean(name)])


def pretrained(tied: bool) -> Any:
    model = llama()
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


def compare(sharded_anchors: bool, anchor_options: dict[str, Any], tied: bool = True, **options: Any) -> dict[str, Any]:
    """Compare both calls, at the anchor and on a drifted model, with float64; returns the facts that tests check."""
    anchors = whole_anchors(pretrained(tied), **anchor_options)
    moved = pretrained(tied)
    drift(moved)
    penalty, wanted = expected_with(anchor_options, pretrained(tied), moved)
    frozen = options.get("frozen", ())
    wanted = {name: COEFF * g for name, g in wanted.items() if not name.startswith(frozen)}

    model = wrapped(pretrained(tied), **options)
    if sharded_anchors:
        anchors = rk.Anchors.from_model(model, RANK, progress=False, **{"basis_dtype": torch.float32, **anchor_options})
    anchors.verify(model)
    result: dict[str, Any] = {
        "names": sorted(anchors),
        "autograd": refused(lambda: rk.rotation_penalty(model, anchors)),
    }
    with torch.no_grad():
        result["at anchor"] = [rk.rotation_penalty(model, anchors).item()]
    result["at anchor"].append(rk.accumulate_rotation_grad_(model, anchors, COEFF).item())
    result["at anchor"] += [float(g.abs().max()) for g in gradients(model).values()]
    model.zero_grad()

    move(model, moved)
    result["other values"] = refused(lambda: anchors.verify(model))
    with torch.no_grad():
        penalties = [rk.rotation_penalty(model, anchors)]
    # Without a gradient at hand, then onto the one that this made.
    penalties.append(rk.accumulate_rotation_grad_(model, anchors, COEFF))
    result["new"] = errors(gradients(model), wanted)
    penalties.append(rk.accumulate_rotation_grad_(model, anchors, COEFF))
    result["twice"] = errors(gradients(model), {name: 2 * g for name, g in wanted.items()})
    model.zero_grad()
    # After a backward pass.
    loss = task_loss(model, own_batch())
    result["before backward"] = refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 0.0))
    loss.backward()
    task = gradients(model)
    penalties.append(rk.accumulate_rotation_grad_(model, anchors, COEFF))
    found = gradients(model)
    result["added"] = errors(found, {name: task[name].double() + g for name, g in wanted.items()})
    # Gathered, frozen ones have zeros.
    result["with gradient"] = [
        clean(name) for name, parameter in model.named_parameters() if parameter.grad is not None
    ]
    result["others changed"] = [
        name for name in task if name not in wanted and not torch.equal(task[name], found[name])
    ]
    with FullyShardedDataParallel.summon_full_params(model):
        result["gathered"] = refused(lambda: rk.accumulate_rotation_grad_(model, anchors, COEFF))
    trained = next(p for p in model.parameters() if p.requires_grad)
    # The mark of torch's _apply_optimizer_in_backward.
    trained._in_backward_optimizers = [torch.optim.SGD([trained])]
    result["stepped within"] = refused(lambda: rk.accumulate_rotation_grad_(model, anchors, COEFF))
    del trained._in_backward_optimizers
    result["penalty"] = max(abs(p.item() / penalty - 1) for p in penalties)
    result["bits"] = [p.item() for p in penalties]
    return result


def train(steps: int, **options: Any) -> float:
    """Return the distance of a sharded run from the unsharded one."""
    alone = train_alone(steps, True)
    model = wrapped(llama(), **options)
    anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        task_loss(model, own_batch()).backward()
        rk.accumulate_rotation_grad_(model, anchors, COEFF)
        model.clip_grad_norm_(1e6)
        optimizer.step()
        optimizer.zero_grad()
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return distance({clean(n): p.detach() for n, p in model.named_parameters()}, alone)
