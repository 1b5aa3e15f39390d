"""Uploads without a GPU: what is cached, what another stream waits for, and what a captured graph does instead."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from rpsft_kernels.ops.triton import table

DEVICE = torch.device("cuda", 0)


class Copy:
    """Stands for a tensor in host or device memory."""

    def __init__(self, values: list[int], gpu: Gpu) -> None:
        self.values, self.gpu = values, gpu
        self.readers: list[str] = []

    def pin_memory(self) -> Copy:
        return self

    def to(self, device: torch.device, non_blocking: bool) -> Copy:
        self.gpu.queued.append((self.gpu.stream.name, "copy", self.values))
        return Copy(self.values, self.gpu)

    def record_stream(self, stream: Stream) -> None:
        self.readers.append(stream.name)


class Stream:
    def __init__(self, name: str, gpu: Gpu) -> None:
        self.name, self.gpu = name, gpu

    def record_event(self) -> str:
        self.gpu.queued.append((self.name, "record", None))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.gpu.queued.append((self.name, "wait", event))


class Gpu:
    """What is queued, and on which stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[tuple[str, str, Any]] = []
        self.capturing = False
        self.stream = Stream("first", self)
        monkeypatch.setattr(table, "_uploads", type(table._uploads)())
        monkeypatch.setattr(table, "_replayed", [])
        monkeypatch.setattr(torch, "from_numpy", lambda array: Copy(array.tolist(), self))
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def upload(self, *values: int) -> Any:
        array = np.array(values)
        return table.upload(array.tobytes(), (array,), DEVICE)[0]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def test_the_same_content_is_uploaded_once(gpu: Gpu) -> None:
    assert gpu.upload(1, 2) is gpu.upload(1, 2)
    assert gpu.queued == [("first", "copy", [1, 2]), ("first", "record", None)]
    assert gpu.upload(3).values == [3]


def test_another_stream_waits_for_the_upload(gpu: Gpu) -> None:
    first = gpu.upload(1)
    gpu.queued.clear()
    gpu.stream = Stream("second", gpu)
    assert gpu.upload(1) is first
    assert gpu.queued == [("second", "wait", "event of first")]
    assert first.readers == ["second"], "its memory is not given away before"


def test_a_captured_graph_has_copies_of_its_own(gpu: Gpu) -> None:
    eager = gpu.upload(1)
    gpu.capturing = True
    captured = [gpu.upload(1), gpu.upload(2)]
    assert captured[0] is not eager
    assert gpu.queued[-2:] == [("first", "copy", [1]), ("first", "copy", [2])], "nothing waits or is recorded"
    assert [host.values for host in table._replayed] == [[1], [2]], "a replay reads them again"
    gpu.capturing = False
    assert gpu.upload(1) is eager
    again = gpu.upload(2)
    assert again is not captured[1], "what only a replay fills serves no call outside of it"
    assert len(table._replayed) == 2


def test_the_cache_is_bounded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_CACHE_ENTRIES", 3)
    first = gpu.upload(0)
    for value in range(1, 4):
        gpu.upload(value)
    assert len(table._uploads) == 3
    assert gpu.upload(0) is not first


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    array = np.arange(5)
    (copied,) = table.upload("key", (array,), torch.device("cpu"))
    assert copied.tolist() == [0, 1, 2, 3, 4]
