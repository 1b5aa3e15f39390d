"""The ranks' part in the tests of plans of sharded models."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as ShardPlacement
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from plans import COEFF, RANK, forget, move
from small_models import linear_layers


@dataclass
class Reshards:
    """The steps after which a call differs from a fresh one, with the difference; R of every step."""

    differences: dict[str, str] = field(default_factory=dict)
    penalties: list[float] = field(default_factory=list)


def _local(tensor: Tensor | None) -> Tensor | None:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _calls(model: Any, anchors: rk.Anchors) -> list[Tensor | None]:
    """Return R and every gradient of both calls. Gradients are as before afterwards."""
    parameters = list(dict.fromkeys(model.parameters()))
    before = [None if p.grad is None else p.grad.clone() for p in parameters]

    def taken() -> list[Tensor | None]:
        found = [None if p.grad is None else _local(p.grad.clone()) for p in parameters]
        for parameter, grad in zip(parameters, before, strict=True):
            parameter.grad = None if grad is None else grad.clone()
        return found

    penalties = [rk.accumulate_rotation_grad_(model, anchors, COEFF)]
    gradients = taken()
    penalties.append(rk.rotation_penalty(model, anchors))
    (COEFF * penalties[-1]).backward()
    return [*(p.detach() for p in penalties), *gradients, *taken()]


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


def reshards() -> Reshards:
    """Gather and shard parameters again, convert, load and move them between calls."""
    model: Any = linear_layers((24, 32, 40, 8))
    anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
    move(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[0], mesh=mesh, reshard_after_forward=False)
    fully_shard(model, mesh=mesh)
    result = Reshards()

    def compare(step: str) -> None:
        found = _calls(model, anchors)
        forget()
        fresh = _calls(model, anchors)
        result.penalties += [float(found[0])]  # type: ignore[arg-type]
        wrong = [str(i) for i, pair in enumerate(zip(found, fresh, strict=True)) if not _same(*pair)]
        if wrong:
            result.differences[step] = ", ".join(wrong)

    def values(seed: int) -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.add_(0.01 * seed * torch.ones_like(local))

    compare("at first")
    compare("again")
    for i in range(2):
        # The root's parameters are shown whole until the backward pass.
        loss = model(torch.ones(3, 24)).square().mean()
        compare(f"between forward and backward pass {i}")
        loss.backward()
        compare(f"after backward pass {i}")
        values(i)
        compare(f"other values {i}")
    model.zero_grad()
    model[0].unshard()
    compare("unsharded")
    model[0].reshard()
    compare("resharded")
    model.to(torch.bfloat16)
    compare("bfloat16")
    model.to(torch.float32)
    compare("float32")
    state = {name: nn.Parameter(tensor.detach().clone()) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    values(3)
    compare("loaded, assigned")
    model.load_state_dict({name: tensor.detach() * 1.01 for name, tensor in state.items()})
    compare("loaded")
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    compare("frozen")
    return result


@dataclass
class Failures:
    """The message of each call that failed ("" where none did), and the gradients that any of them left."""

    messages: dict[str, str] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)


def failures(wrapper: str) -> Failures:
    """The last rank spoils one call after the other, then dies; no rank has a gradient at any time but the first's."""
    model: Any = linear_layers((24, 32, 40, 8))
    anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
    move(model)
    odd = dist.get_rank() == dist.get_world_size() - 1
    if wrapper == "ddp":
        model = DistributedDataParallel(model)
    else:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    result = Failures()
    held = [p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]
    values = [local.clone() for local in held]

    def attempt(step: str, given: object = anchors) -> None:
        message = ""
        for call in (
            lambda: rk.accumulate_rotation_grad_(model, given, COEFF),  # type: ignore[arg-type]
            lambda: rk.rotation_penalty(model, given),  # type: ignore[arg-type]
        ):
            if step == "dead" and message:
                break
            try:
                call()
            except (ValueError, RuntimeError) as error:
                message = str(error)
            if message:
                result.left += [f"{step}: {n}" for n, p in model.named_parameters() if p.grad is not None]
            model.zero_grad()
        result.messages[step] = message

    for _ in range(2):
        rk.accumulate_rotation_grad_(model, anchors, COEFF)
        model.zero_grad()
    if odd:
        for local in held:
            local.fill_(float("nan"))
    attempt("not finite")
    for local, value in zip(held, values, strict=True):
        local.copy_(value)
    attempt("refused", {} if odd else anchors)
    attempt("after")
    if odd:
        os.kill(os.getpid(), signal.SIGKILL)
    attempt("dead")
    return result


def redistributed_gradients() -> float:
    """Return the error of gradients that were still being reduced when they were added to."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    pretrained = torch.randn(24, 40)
    weight = pretrained + 0.1 * torch.randn(24, 40)
    anchor = rk.Anchor.from_weight(pretrained, 4)
    whole = torch.nn.Parameter(weight.clone())
    rk.accumulate_rotation_grad_([whole], [anchor], 1.0)
    assert whole.grad is not None
    error = 0.0
    for placement in (ShardPlacement(0), Replicate()):
        parameter = torch.nn.Parameter(distribute_tensor(weight, mesh, [placement]))
        gradient = DTensor.from_local(torch.zeros(24, 40), mesh, [Partial()])
        with torch.no_grad():
            parameter.grad = gradient.redistribute(mesh, [placement], async_op=True)
        rk.accumulate_rotation_grad_([parameter], [anchor], 1.0)
        found = parameter.grad.full_tensor()  # type: ignore[union-attr]
        error = max(error, ((found - whole.grad).norm() / whole.grad.norm()).item())
    return 0.0 if error < 1e-5 else error
