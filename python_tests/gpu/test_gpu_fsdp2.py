"""FSDP2 over NCCL in one process: both calls against float64, and training beside the unsharded model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rpsft_kernels as rk
from support import exact_gradient, exact_penalty

fsdp = pytest.importorskip("torch.distributed.fsdp")
if not hasattr(fsdp, "fully_shard"):
    pytest.skip("this torch has no torch.distributed.fsdp.fully_shard", allow_module_level=True)

# One process group at a time in a process; all of it in one worker.
pytestmark = [
    pytest.mark.xdist_group("fsdp2"),
    pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL"),
]
RANK, COEFF = 48, 0.3
# The last layer is full at this rank.
SIZES = ((200, 96), (136, 200), (40, 136))
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16 weights": {},
    "mixed precision": {"mp_policy": fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "CPU offload": {"offload_policy": fsdp.CPUOffloadPolicy(pin_memory=True)},
}


@pytest.fixture(params=["nccl", "cpu:gloo,cuda:nccl"])
def group(
    request: pytest.FixtureRequest, tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    # One process talks to nobody: a machine without a network will do.
    for library in ("NCCL", "GLOO"):
        monkeypatch.setenv(f"{library}_SOCKET_IFNAME", "lo")
    torch.cuda.set_device(0)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group(request.param, store=store, rank=0, world_size=1)
    try:
        yield request.param
    finally:
        dist.destroy_process_group()


def make_pretrained(kind: str, device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [layer for out, size in SIZES for layer in (nn.Linear(size, out, bias=False), nn.Tanh())]
    # Exact in bfloat16, as checkpoints are.
    model = nn.Sequential(*layers[:-1]).bfloat16().to(device)
    return model if kind == "bfloat16 weights" else model.float()


def move(model: nn.Sequential) -> nn.Sequential:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_((0.01 * noise).to(parameter.dtype))
    return model


def shard(model: nn.Sequential, kind: str) -> nn.Sequential:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fsdp.fully_shard(layer, **KINDS[kind])
    result: nn.Sequential = fsdp.fully_shard(model, **KINDS[kind])
    return result


def batch(device: torch.device, turn: int = 0) -> Tensor:
    return torch.randn(16, SIZES[0][1], generator=torch.Generator().manual_seed(turn)).to(device)


def loss_of(model: nn.Module, kind: str, inputs: Tensor) -> Tensor:
    outputs: Tensor = model(inputs.bfloat16() if kind == "bfloat16 weights" else inputs)
    return outputs.float().square().mean()


def tensors(model: nn.Module, device: torch.device, gradients: bool = False) -> dict[str, Tensor]:
    """Copies of whole parameters or gradients by name; one process has all of each."""
    found = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.grad if gradients else parameter.detach()
        if tensor is not None:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            found[name] = local.to(device, copy=True)
    return found


def tolerance(kind: str) -> float:
    # The kernels round to bfloat16 four times (CPU engines too, with bfloat16 bases).
    return 4 * 2**-9 + (2.0**-7 if kind == "bfloat16 weights" else 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_both_calls_are_those_of_the_unsharded_weights(kind: str, group: str, device: torch.device) -> None:
    whole = make_pretrained(kind, device)
    reference = rk.Anchors.from_model(whole, RANK, progress=False)
    assert {anchor.form for anchor in reference.values()} == {"base", "full"}
    model = shard(make_pretrained(kind, device), kind)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    assert list(anchors) == list(reference)
    # At the anchor, before anything was trained.
    loss_of(model, kind, batch(device)).backward()
    model.zero_grad()
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    move(whole)
    with torch.no_grad():
        for sharded_one, whole_one in zip(model.parameters(), whole.parameters(), strict=True):
            sharded_one.to_local().copy_(whole_one)
    weights = {name: parameter.detach() for name, parameter in whole.named_parameters()}
    penalty = sum(float(exact_penalty(weights[name], reference[name])) for name in reference)
    exact = {name: COEFF * exact_gradient(weights[name], reference[name]) for name in reference}

    def check(value: Tensor, times: int) -> None:
        assert abs(float(value.detach()) / penalty - 1) < tolerance(kind)
        found = tensors(model, device, gradients=True)
        assert found.keys() == exact.keys()
        for name, grad in found.items():
            error = float((grad.double() - times * exact[name]).norm())
            assert error <= tolerance(kind) * times * float(exact[name].norm()), name

    task = 0 * loss_of(model, kind, batch(device))
    value = rk.rotation_penalty(model, anchors)
    (task + COEFF * value.to(task.device)).backward()
    check(value, 1)
    check(rk.accumulate_rotation_grad_(model, anchors, COEFF), 2)
    model.zero_grad()
    check(rk.accumulate_rotation_grad_(model, anchors, COEFF), 1)


@pytest.mark.parametrize("call", ["autograd", "accumulate"])
@pytest.mark.parametrize("kind", ["plain", "CPU offload"])
def test_training_stays_with_the_unsharded_model(kind: str, call: str, group: str, device: torch.device) -> None:
    def train(model: nn.Sequential) -> dict[str, Tensor]:
        anchors = rk.Anchors.from_model(model, RANK, progress=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        for turn in range(5):
            loss = loss_of(model, kind, batch(device, turn))
            if call == "autograd":
                (loss + COEFF * rk.rotation_penalty(model, anchors).to(loss.device)).backward()
            else:
                loss.backward()
                rk.accumulate_rotation_grad_(model, anchors, COEFF)
            optimizer.step()
            optimizer.zero_grad()
        return tensors(model, device)

    start = tensors(make_pretrained(kind, device), device)
    alone = train(make_pretrained(kind, device))
    found = train(shard(make_pretrained(kind, device), kind))
    for name, value in alone.items():
        distance = (value - start[name]).norm()
        assert float(distance) > 0
        # The penalty's gradient alone may differ by a hundredth, and it is only one summand.
        assert float((found[name] - value).norm()) < 0.01 * float(distance), name
