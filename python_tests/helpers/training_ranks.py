"""The ranks' part in the tests of training: corrections of shards and replicas, budgets, files that ranks share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
from closed_forms import corrected, exact_drifts
from small_models import linear_layers, mean_square, refused, vectors
from support import relative_error

# Of (96, 512), (512, 96) and (96, 20): two that two ranks cut, and one of whose rank the anchor is full.
SIZES = (96, 512, 96, 20)
RANK = 24
KINDS = ("ddp", "fsdp2", "fsdp1")


def _layers() -> nn.Sequential:
    return linear_layers(SIZES)


def _wrap(kind: str, model: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(model, mesh=mesh)


def _noise(model: nn.Module, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: scale * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


@torch.no_grad()
def _drift(model: nn.Module, noise: dict[str, Tensor]) -> None:
    """Move the weights of a wrapped model as a whole one's."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            for name, parameter in model.named_parameters():
                parameter.add_(noise[name.replace("_fsdp_wrapped_module.", "")])
        return
    for name, parameter in model.named_parameters():
        added = noise[name.removeprefix("module.")]
        if isinstance(parameter, DTensor):
            added = distribute_tensor(added, parameter.device_mesh, parameter.placements)
        parameter.add_(added)


@torch.no_grad()
def _whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the weights, whole, by the names of the unwrapped model."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {n.replace("_fsdp_wrapped_module.", ""): p.clone() for n, p in model.named_parameters()}
    return {
        n.removeprefix("module."): (p.full_tensor() if isinstance(p, DTensor) else p.detach()).clone()
        for n, p in model.named_parameters()
    }


def correct_and_train(kinds: list[str], folder: str) -> dict[str, Any]:
    """Correct weights in every wrapper, mode and form, and compare with one process in float64; then train."""
    corrections = {
        f"{kind}, {mode}, {'base' if keep_base else 'block'}": _correct(kind, mode, keep_base)
        for kind in kinds
        for mode in ("decoupled", "project")
        for keep_base in (True, False)
    }
    trained = {
        f"{kind}, {mode}": _train(kind, mode, Path(folder) / f"{kind}-{mode}")
        for kind in kinds
        if kind != "fsdp1"
        for mode in ("gradient", "decoupled")
    }
    return {
        "corrections": corrections,
        "trained": trained,
        "a file that one rank sees": _lonely_file(Path(folder)),
        "deviating lr": _deviating(),
    }


def _correct(kind: str, mode: Any, keep_base: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"keep_base": keep_base, "basis_dtype": torch.float32}
    alone = _layers()
    frozen = "0.weight" if kind == "ddp" else None
    whole = rk.Anchors.from_model(alone, RANK, progress=False, **options)
    noise = _noise(alone, 0.01)
    _drift(alone, noise)
    drifts = exact_drifts(alone, whole)
    before = sum(float(drift.square().sum()) for drift in drifts.values())

    wrapped_model = _layers()
    if frozen is not None:
        wrapped_model.get_parameter(frozen).requires_grad_(False)
    model = _wrap(kind, wrapped_model)
    strength = {"coeff": 3.0} if mode == "decoupled" else {"budget": 1.0}
    penalty = rk.RotationPenalty(RANK, mode=mode, per_layer=True, **options, **strength).anchor(model)
    energy = penalty.state_dict()["energy"]
    if mode == "project":
        # What is frozen keeps its R: the others have to be scaled down further.
        penalty = rk.RotationPenalty(
            RANK, mode=mode, budget=(0.3 * before / energy) ** 0.5, anchors=penalty.anchors, **options
        )
    _drift(model, noise)
    start = _whole(model)
    left = float(penalty.after_step_(model, lr=0.1))
    ended = _whole(model)
    still = float(drifts[frozen].square().sum()) / before if frozen is not None else 0.0
    if mode == "decoupled":
        share = 2 * 0.1 * 3.0 / (1 + 2 * 0.1 * 3.0)
    else:
        share = 1 - ((0.3 - still) / (1 - still)) ** 0.5
    expected = corrected(alone, whole, share)
    errors = {
        name: relative_error(ended[name] - start[name], expected[name] - start[name].double())
        for name in whole
        if name != frozen
    }
    layers = {n.removeprefix("rotation/layers/"): v for n, v in penalty.metrics().items() if "/layers/" in n}
    return {
        "errors": errors,
        "frozen stays": frozen is None or torch.equal(ended[frozen], start[frozen]),
        "others stay": all(torch.equal(ended[name], start[name]) for name in ended if name not in whole),
        "left": left / before,
        "expected": still + (1 - still) * (1 - share) ** 2,
        "layers": {name: value / float(drifts[name].square().sum()) for name, value in layers.items()},
        "energy": energy / rk.RotationPenalty(anchors=whole).anchor(_layers()).state_dict()["energy"],
        "bits": {name: tensor.view(torch.int32).sum().item() for name, tensor in ended.items()},
    }


def _train(kind: str, mode: Any, path: Path, steps: int = 12) -> dict[str, Any]:
    model = _wrap(kind, _layers())
    penalty = rk.RotationPenalty(RANK, budget=0.01, mode=mode, path=path).anchor(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    if mode != "gradient":
        rk.attach(optimizer, penalty, model)
    # Ranks have batches of their own, and gradients of their own before they are averaged.
    inputs = vectors(SIZES[0]) + dist.get_rank()
    states: list[Any] = []
    observed = 0.0
    for step in range(steps):
        if mode == "gradient" and kind == "ddp":
            penalty.add_gradients_(model)
        mean_square(model, inputs).backward()
        if mode == "gradient" and kind == "ddp":
            penalty.observe_gradients(model)
            squares = [p.grad.double().square().sum() for n, p in model.named_parameters() if n.endswith("weight")]
            observed = float(torch.stack(squares).sum().sqrt())
        elif mode == "gradient":
            penalty.add_gradients_(model)
        optimizer.step()
        optimizer.zero_grad()
        if step == steps // 2:
            states = [penalty.state_dict(), copy.deepcopy(_whole(model))]
    again = rk.RotationPenalty(RANK, budget=0.01, mode=mode, path=path)
    again.load_state_dict(states[0])
    # The model has been trained since: the file is read without a comparison.
    again.anchor(model)
    return {
        "state": penalty.state_dict(),
        "metrics": penalty.metrics(),
        "observed": observed,
        "again": again.state_dict() == states[0],
        "bits": {name: tensor.view(torch.int32).sum().item() for name, tensor in _whole(model).items()},
    }


def _lonely_file(folder: Path) -> str:
    path = folder / "lonely.safetensors"
    if dist.get_rank() == 0:
        path.touch()
    dist.barrier()
    # Paths that differ stand for a disk that ranks do not share.
    mine = path if dist.get_rank() == 0 else folder / "elsewhere.safetensors"
    model = _wrap("ddp", _layers())
    return refused(lambda: rk.RotationPenalty(RANK, path=mine).anchor(model))


def _deviating() -> dict[str, Any]:
    """Ranks that ask for different corrections: all refuse, and no weight has changed."""
    model = _wrap("ddp", _layers())
    penalty = rk.RotationPenalty(RANK, mode="decoupled").anchor(model)
    _drift(model, _noise(_layers(), 0.01))
    before = _whole(model)
    message = refused(lambda: penalty.after_step_(model, lr=0.1 * (1 + dist.get_rank())))
    return {"message": message, "unchanged": all(torch.equal(_whole(model)[n], t) for n, t in before.items())}
