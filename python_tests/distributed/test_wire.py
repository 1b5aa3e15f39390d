"""A group that has no backend for the weights' device sends through another one."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exchange_ranks import send_through_another_device
from ranks import needs_fsdp2, run_ranks
from rpsft_kernels.distributed import gather_objects, remember_device
from rpsft_kernels.distributed.wire import find_wire

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


def _group(monkeypatch: pytest.MonkeyPatch, config: str, gpus: bool = True, bound: torch.device | None = None) -> Any:
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return SimpleNamespace(bound_device_id=bound, group_name="a group")


@pytest.mark.parametrize(
    ("config", "device", "bound", "expected"),
    [
        ("cuda:nccl", CPU, None, torch.device("cuda", 3)),
        ("cuda:nccl", CPU, GPU, GPU),
        ("cuda:nccl", GPU, None, GPU),
        ("cpu:gloo,cuda:nccl", CPU, None, CPU),
        ("cpu:gloo", GPU, None, CPU),
        ("undefined", CPU, None, CPU),
    ],
)
def test_a_device_that_the_group_serves(
    config: str,
    device: torch.device,
    bound: torch.device | None,
    expected: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert find_wire(_group(monkeypatch, config, bound=bound), device) == expected


def test_a_group_that_serves_no_device_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r'serves cuda alone .* init_process_group\("cpu:gloo,cuda:nccl"\)'):
        find_wire(_group(monkeypatch, "cuda:nccl", gpus=False), CPU)


@needs_fsdp2
def test_what_travels_through_another_device_has_the_same_bits() -> None:
    for moved, plain, sums in run_ranks(2, send_through_another_device):
        assert moved == plain and sums > 2


def test_objects_travel_through_the_gpu_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[torch.device] = []

    @contextmanager
    def record(device: torch.device) -> Any:
        entered.append(device)
        yield

    group: Any = SimpleNamespace(group_name="the group of a test", size=lambda: 1)
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(device=record))
    monkeypatch.setattr(dist, "all_gather_object", lambda found, value, group: found.__setitem__(0, value))
    for device in (CPU, GPU):
        remember_device(group, device)
        assert gather_objects("told", group) == ["told"]
    assert entered == [GPU]
