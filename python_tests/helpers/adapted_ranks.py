"""The ranks' part in the tests of adapted models over several processes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from adapted_models import (
    CASES,
    Case,
    adapt,
    anchors_of,
    dense_penalty,
    distance,
    gpt2,
    gradients,
    llama,
    move,
    pretrained,
)
from small_models import refused

COEFF = 0.5
SHARDED = {
    "LoRA": CASES["LoRA"],
    "two adapters": CASES["two adapters"],
    "trained copies": Case(lambda: adapt(llama(), modules_to_save=["o_proj"])),
    "started": CASES["PiSSA"],
    # Seven ranks of A do not divide by two, and nothing is left of the second half of one.
    "odd": Case(lambda: adapt(llama(), r=1, rank_pattern={"q_proj": 7})),
    "Conv1D": Case(lambda: adapt(gpt2(), ["c_attn", "c_fc", "wte"], fan_in_fan_out=True)),
}
# Of these the part of an anchor that a rank keeps has not the rows that its adapters need.
WHOLE_ONLY = {"started", "two adapters", "Conv1D"}


def _shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    blocks = [module for module in model.modules() if type(module).__name__ in ("LlamaDecoderLayer", "GPT2Block")]
    for block in blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _whole(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad for name, grad in grads.items()}


def _right(case: Case) -> tuple[rk.Anchors, float, dict[str, Tensor]]:
    """Return the anchors of a whole model, and R and its gradients once it has moved, by the dense formula."""
    model = case.make()
    start = pretrained(model)
    anchors = anchors_of(model, case.at)
    move(model)
    penalty = dense_penalty(model, anchors, start)
    copied = {name: p for name, p in model.named_parameters() if "modules_to_save" in name and p.ndim == 2}
    for name, parameter in copied.items():
        plain = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
        original = dict(model.named_parameters())[name.replace("modules_to_save.default", "original_module")]
        anchor = anchors[plain]
        assert anchor.left is not None and anchor.right is not None
        penalty = penalty + (anchor.left.T @ (parameter - original.detach()) @ anchor.right).square().sum()
    penalty.backward()
    return anchors, penalty.item(), gradients(model)


def compare_sharded(name: str) -> dict[str, Any]:
    """Compare both calls on a sharded model with the dense formula."""
    case = SHARDED[name]
    whole, penalty, wanted = _right(case)
    moved = case.make()
    move(moved)
    result: dict[str, Any] = {}
    for made in ("whole",) if name in WHOLE_ONLY else ("whole", "sharded"):
        model = _shard(case.make())
        anchors = whole if made == "whole" else anchors_of(model, case.at)
        result[f"{made} start"] = rk.rotation_penalty(model, anchors).item()
        with torch.no_grad():
            for (_, parameter), (_, value) in zip(model.named_parameters(), moved.named_parameters(), strict=True):
                parameter.copy_(
                    torch.distributed.tensor.distribute_tensor(value, parameter.device_mesh, parameter.placements)
                )
        found = rk.rotation_penalty(model, anchors)
        (COEFF * found).backward()
        autograd = _whole(gradients(model))
        again = rk.accumulate_rotation_grad_(model, anchors, COEFF)
        twice = _whole(gradients(model))
        result[f"{made} R"] = abs(found.item() / penalty - 1)
        result[f"{made} autograd"] = distance(autograd, {key: COEFF * grad for key, grad in wanted.items()})
        result[f"{made} accumulated"] = distance(twice, {key: 2 * COEFF * grad for key, grad in wanted.items()})
        result[f"{made} bits"] = (found.item(), again.item())
    return result


def compare_replicated() -> dict[str, Any]:
    """Add gradients under DistributedDataParallel before and after the backward pass that averages."""
    case = CASES["LoRA"]
    whole, penalty, wanted = _right(case)
    result: dict[str, Any] = {}
    inputs = torch.arange(10).view(1, 10) + 5 * dist.get_rank()
    for order in ("before", "after", "in the loss", "anchored replicas"):
        model = case.make()
        move(model)
        # What it may leave unaveraged is the same on every rank.
        replicas = DistributedDataParallel(model, find_unused_parameters=order == "after")
        anchors = anchors_of(DistributedDataParallel(case.make())) if order == "anchored replicas" else whole
        loss = replicas(input_ids=inputs, labels=inputs).loss
        if order == "before":
            found = rk.accumulate_rotation_grad_(replicas, anchors, COEFF)
            loss.backward()
        elif order == "in the loss":
            found = rk.rotation_penalty(replicas, anchors)
            (loss + COEFF * found).backward()
        else:
            loss.backward()
            found = rk.accumulate_rotation_grad_(replicas, anchors, COEFF)
        both = gradients(model)
        model.zero_grad()
        replicas(input_ids=inputs, labels=inputs).loss.backward()
        task = gradients(model)
        own = {name: grad - task[name] for name, grad in both.items()}
        result[f"{order} R"] = abs(found.item() / penalty - 1)
        result[f"{order} gradients"] = distance(own, {key: COEFF * grad for key, grad in wanted.items()})
        result[f"{order} bits"] = found.item()
    return result


def refuse_together() -> list[str]:
    """Return what this rank is told where one of them cannot go on, or means another call."""
    model = _shard(CASES["LoRA"].make())
    anchors = anchors_of(model)
    rank = dist.get_rank()
    messages = [refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0 + rank))]
    if rank:
        model.base_model.disable_adapter_layers()
    messages.append(refused(lambda: rk.rotation_penalty(model, anchors)))
    if rank:
        model.base_model.enable_adapter_layers()
    factor: nn.Parameter = next(p for n, p in model.named_parameters() if "lora_B" in n)
    if rank:
        with torch.no_grad():
            factor.to_local()[0] = float("nan")  # type: ignore[operator]
    messages.append(refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0)))
    messages.append(str([name for name, p in model.named_parameters() if p.grad is not None]))
    return messages


def everything() -> dict[str, Any]:
    """Do all of it in one launch."""
    torch.manual_seed(0)
    result: dict[str, Any] = {name: compare_sharded(name) for name in SHARDED}
    result["replicated"] = compare_replicated()
    result["refused"] = refuse_together()
    return result
