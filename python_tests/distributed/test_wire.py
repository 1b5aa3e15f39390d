"""A group that has no backend for the weights' device sends through another one."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from exchange_ranks import send_through_another_device
from ranks import needs_fsdp2, run_ranks
from rpsft_kernels.anchors import save
from rpsft_kernels.anchors.file_format import Contents
from rpsft_kernels.distributed import Shard, gather_objects, remember_device, wire
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


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The devices that objects travel through, of a process that knows no weights yet."""
    found: list[torch.device] = []

    @contextmanager
    def record(device: torch.device) -> Any:
        found.append(device)
        yield

    monkeypatch.setattr(wire, "_devices", {})
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace(device=record))
    monkeypatch.setattr(dist, "all_gather_object", lambda found, value, group: found.__setitem__(0, value))
    return found


def _alone(name: str) -> Any:
    return SimpleNamespace(group_name=name, size=lambda: 1)


def test_objects_travel_through_the_gpu_of_the_weights(entered: list[torch.device]) -> None:
    group = _alone("a group")
    for device in (CPU, GPU):
        remember_device(group, device)
        assert gather_objects("told", group) == ["told"]
    assert entered == [GPU]


def test_objects_of_a_group_without_weights_travel_through_the_gpu_of_other_weights(
    entered: list[torch.device],
) -> None:
    """Anchors over a part of the ranks are saved by all of them."""
    everyone = _alone("everyone")
    gather_objects("told", everyone)
    assert entered == []
    remember_device(_alone("a group"), GPU)
    remember_device(_alone("another group"), CPU)
    gather_objects("told", everyone)
    assert entered == [GPU]


def test_sharded_anchors_on_a_gpu_are_saved_through_it(
    entered: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda *_: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD=_alone("everyone")))
    monkeypatch.setattr(save, "write_anchors", lambda *_: None)
    part: Any = SimpleNamespace(device=GPU, held=Shard.whole((2, 2)))
    save.save_sharded(tmp_path / "anchors", Contents({"weight": part}, {}, {}))
    assert (tmp_path / "anchors" / "anchors.json").is_file()
    assert len(entered) >= 5 and set(entered) == {GPU}
