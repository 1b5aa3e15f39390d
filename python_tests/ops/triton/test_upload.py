"""Uploads without a GPU: what is cached, what another stream waits for, and what a captured graph does instead."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rpsft_kernels.ops.triton import upload as uploads
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH

DEVICE = torch.device("cuda", 0)
ROOM = 4096


class Copied(Tensor):
    """Stands for a tensor in the memory of a GPU."""

    readers: list[str]

    def record_stream(self, stream: Any) -> None:
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
    """What is queued, and on which stream; pinned memory that no capture may ask for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[tuple[str, str, Any]] = []
        self.pinned: list[Tensor] = []
        self.capturing = False
        self.stream = Stream("first", self)
        for name, value in (("_uploads", type(uploads._uploads)()), ("_replayed", {}), ("_cached_bytes", 0)):
            monkeypatch.setattr(uploads, name, value)
        monkeypatch.setattr(uploads, "_SMALLEST_ROOM", ROOM)
        monkeypatch.setattr(uploads, "_room", uploads._Room())
        monkeypatch.setattr(uploads, "_pinned", self._pin)
        monkeypatch.setattr(uploads, "_queued_copy", self._copy)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _pin(self, size: int) -> Tensor:
        assert not self.capturing, "CUDA allows no allocation of pinned memory within a capture"
        self.pinned.append(torch.full((size,), 77, dtype=torch.uint8))
        return self.pinned[-1]

    def _copy(self, host: Tensor, device: torch.device) -> Tensor:
        assert device == DEVICE
        inside = [one.data_ptr() <= host.data_ptr() < one.data_ptr() + one.numel() for one in self.pinned]
        assert any(inside), "copied from pageable memory"
        self.queued.append((self.stream.name, "copy", host.view(torch.int64)[: host.numel() // 8].tolist()))
        copied = host.clone().as_subclass(Copied)
        copied.readers = []
        return copied

    def upload(self, *values: int) -> Tensor:
        array = np.array(values)
        return uploads.upload(array.tobytes(), (array,), DEVICE)[0]

    def copies(self) -> list[tuple[str, list[int]]]:
        return [(stream, [v for v in values if v]) for stream, kind, values in self.queued if kind == "copy"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def contents(tensors: Sequence[Tensor]) -> list[list[float]]:
    return [tensor.tolist() for tensor in tensors]


def test_the_same_content_is_uploaded_once(gpu: Gpu) -> None:
    assert gpu.upload(1, 2) is gpu.upload(1, 2)
    assert gpu.copies() == [("first", [1, 2])] and gpu.queued[-1] == ("first", "record", None)
    assert gpu.upload(3).tolist() == [3]


def test_arrays_of_one_key_travel_in_one_copy(gpu: Gpu) -> None:
    arrays = (np.arange(40, dtype=np.int32).reshape(8, 5), np.zeros(0, np.int32), np.array([0.5], np.float32))
    found = uploads.upload("key", (*arrays, np.array([7, 9])), DEVICE)
    assert contents(found) == [list(range(40)), [], [0.5], [7, 9]]
    assert [tensor.dtype for tensor in found] == [torch.int32, torch.int32, torch.float32, torch.int64]
    assert len(gpu.copies()) == 1
    begins = [(tensor.data_ptr() - found[0].data_ptr()) % uploads._ALIGNMENT for tensor in found if tensor.numel()]
    assert begins == [0, 0, 0], "kernels read vectors"


def test_scales_of_the_cpu_travel_with_the_table(gpu: Gpu) -> None:
    columns = {"NUMBER": [1, 0]}
    scales = torch.tensor([[0.5, 9.0], [-2.0, 9.0]])[:, 0].requires_grad_()
    fields, numbers = uploads.upload_fields_and_scales(columns, 2, scales, DEVICE)
    assert fields[INDEX["NUMBER"] :: WIDTH].tolist() == [1, 0] and numbers.tolist() == [0.5, -2.0]
    assert len(gpu.copies()) == 1 and numbers.dtype == torch.float32
    assert uploads.upload_fields_and_scales(columns, 2, scales, DEVICE)[1] is numbers
    other = uploads.upload_fields_and_scales(columns, 2, scales.detach().double() + 1, DEVICE)
    assert other[1].tolist() == [1.5, -1.0] and len(gpu.copies()) == 2


def test_another_stream_waits_for_the_upload(gpu: Gpu) -> None:
    first = gpu.upload(1)
    gpu.queued.clear()
    gpu.stream = Stream("second", gpu)
    assert gpu.upload(1) is first
    assert gpu.queued == [("second", "wait", "event of first")]
    ((_, upload),) = uploads._uploads.items()
    assert upload.memory.readers == ["second"], "its memory is not given away before"  # type: ignore[attr-defined]


def test_a_captured_graph_has_copies_of_its_own(gpu: Gpu) -> None:
    eager = gpu.upload(1)
    gpu.capturing = True
    gpu.queued.clear()
    captured = [gpu.upload(1), gpu.upload(2), gpu.upload(1)]
    assert captured[0] is not eager and captured[2] is not captured[0]
    assert contents(captured) == [[1], [2], [1]]
    assert gpu.copies() == [("first", [1]), ("first", [2]), ("first", [1])]
    assert len(gpu.queued) == 3, "nothing waits or is recorded"
    gpu.capturing = False
    assert gpu.upload(1) is eager
    again = gpu.upload(2)
    assert again is not captured[1], "what only a replay fills serves no call outside of it"
    for value in range(10, 60):
        gpu.upload(value)
    held = [host.view(torch.int64)[0].item() for host in uploads._replayed.values()]
    assert held == [1, 2], "a replay reads them again"


def test_a_step_that_has_run_leaves_room_for_its_capture(gpu: Gpu) -> None:
    contents_of_a_step = [tuple(range(100 * i, 100 * i + 97)) for i in range(40)]
    for _ in range(3):
        for content in contents_of_a_step:
            gpu.upload(*content)
        gpu.capturing = True
        for content in contents_of_a_step:
            # Other pointers: a capture has memory of its own.
            assert gpu.upload(*content, len(uploads._replayed)).numel() == 98
        gpu.capturing = False


def test_a_capture_without_a_step_before_is_refused(gpu: Gpu) -> None:
    gpu.upload(1)
    gpu.capturing = True
    with pytest.raises(RuntimeError, match=rf"CUDA graph: .* 8192 more bytes .* {ROOM} are set aside; .* run it once"):
        gpu.upload(*range(1, 1025))
    assert gpu.upload(2).tolist() == [2]


def test_the_cache_and_the_room_are_bounded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_CACHE_ENTRIES", 3)
    first = gpu.upload(0)
    for value in range(1, 200):
        gpu.upload(value)
    assert len(uploads._uploads) == 3 and uploads._cached_bytes == 3 * uploads._ALIGNMENT
    assert gpu.upload(0) is not first
    assert [memory.numel() for memory in gpu.pinned].count(ROOM) == 1


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    array = np.arange(5)
    (copied,) = uploads.upload("key", (array,), torch.device("cpu"))
    assert copied.tolist() == [0, 1, 2, 3, 4]
