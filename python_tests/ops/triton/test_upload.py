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


class Memory:
    """Stands for memory of a GPU that is filled in place."""

    device = DEVICE

    def __init__(self, gpu: Gpu, count: int) -> None:
        self.gpu, self.inner = gpu, torch.zeros(count, dtype=torch.int64)

    def view(self, dtype: torch.dtype) -> Memory:
        assert dtype == torch.uint8
        return self

    def copy_(self, host: Tensor, non_blocking: bool) -> None:
        assert non_blocking
        self.gpu.note_copy(host)
        self.inner.copy_(host.view(torch.int64))


class Gpu:
    """Records the copies and their streams; no capture may ask for pinned memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.queued: list[tuple[str, str, Any]] = []
        self.pinned: list[Tensor] = []
        self.capturing = False
        self.stream = Stream("first", self)
        for name, value in (("_uploads", type(uploads._uploads)()), ("_replayed", {}), ("_cached_bytes", 0)):
            monkeypatch.setattr(uploads, name, value)
        monkeypatch.setattr(uploads, "_SMALLEST_RESERVE", ROOM)
        monkeypatch.setattr(uploads, "_reserve", uploads._CaptureReserve())
        monkeypatch.setattr(uploads, "_allocate_pinned", self._pin)
        monkeypatch.setattr(uploads, "_queue_copy", self._copy)
        monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: self.stream)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    def _pin(self, size: int) -> Tensor:
        assert not self.capturing, "CUDA allows no allocation of pinned memory within a capture"
        self.pinned.append(torch.full((size,), 77, dtype=torch.uint8))
        return self.pinned[-1]

    def _copy(self, host: Tensor, device: torch.device) -> Tensor:
        assert device == DEVICE
        self.note_copy(host)
        copied = host.clone().as_subclass(Copied)
        copied.readers = []
        return copied

    def note_copy(self, host: Tensor) -> None:
        inside = [one.data_ptr() <= host.data_ptr() < one.data_ptr() + one.numel() for one in self.pinned]
        assert any(inside), "copied from pageable memory"
        self.queued.append((self.stream.name, "copy", host.view(torch.int64)[: host.numel() // 8].tolist()))

    def copy_rows(self, memory: Memory, *values: int) -> None:
        uploads.copy_rows(np.array(values).reshape(-1, 1), memory)  # type: ignore[arg-type]

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
    begins = [(tensor.data_ptr() - found[0].data_ptr()) % uploads.ALIGNMENT for tensor in found if tensor.numel()]
    assert begins == [0, 0, 0], "kernels read vectors"


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
    assert len(uploads._uploads) == 3 and uploads._cached_bytes == 3 * uploads.ALIGNMENT
    assert gpu.upload(0) is not first
    assert [memory.numel() for memory in gpu.pinned].count(ROOM) == 1


class Sent:
    """Stands for a table."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_rows_are_copied_in_place_from_pinned_memory(gpu: Gpu) -> None:
    memory = Memory(gpu, 3)
    for values in ((1, 2, 3), (1, 2, 3), (4, 5, 6)):
        gpu.copy_rows(memory, *values)
        assert memory.inner.tolist() == list(values)
    assert gpu.queued == [("first", "copy", [1, 2, 3]), ("first", "copy", [1, 2, 3]), ("first", "copy", [4, 5, 6])]
    hosts = [pinned.data_ptr() for pinned in gpu.pinned]
    assert len(set(hosts)) == 3, "what a copy still reads is not written"


def test_rows_of_a_capture_stay_for_its_replays(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "_tables", {Sent(2 * uploads.ALIGNMENT)})
    uploads.reserve_for_captures()
    memory, other = Memory(gpu, 2), Memory(gpu, 2)
    gpu.capturing = True
    gpu.copy_rows(memory, 1, 2)
    gpu.copy_rows(other, 3, 4)
    gpu.copy_rows(memory, 1, 2)
    gpu.capturing = False
    for value in range(50):
        gpu.copy_rows(other, value, value)
    assert [host.view(torch.int64).tolist() for host in uploads._replayed.values()] == [[1, 2], [3, 4]]


def test_room_is_set_aside_for_tables_again_after_each_capture(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each capture sends other rows, as its memory lies elsewhere; a backward pass sends some a second time."""
    monkeypatch.setattr(uploads, "_tables", {Sent(8 * ROOM)})
    size = ROOM
    memory = Memory(gpu, size)
    for turn in range(5):
        uploads.reserve_for_captures()
        gpu.capturing = True
        for at in (2 * turn, 2 * turn + 1):
            gpu.copy_rows(memory, *range(at * size, (at + 1) * size))
        gpu.capturing = False


def test_operators_by_themselves_find_half_a_room(gpu: Gpu) -> None:
    """Their tables are gone when they return."""
    size = ROOM // 16
    memory = Memory(gpu, size)
    for turn in range(5):
        gpu.upload(1)
        gpu.capturing = True
        gpu.copy_rows(memory, *range(turn * size, (turn + 1) * size))
        gpu.capturing = False
    gpu.capturing = True
    gpu.copy_rows(memory, *range(5 * size, 6 * size))
    with pytest.raises(RuntimeError, match=r"CUDA graph: .* run it once"):
        gpu.copy_rows(memory, *range(6 * size, 7 * size))


def test_on_the_cpu_there_is_nothing_to_wait_for() -> None:
    array = np.arange(5)
    (copied,) = uploads.upload("key", (array,), torch.device("cpu"))
    assert copied.tolist() == [0, 1, 2, 3, 4]
    rows = torch.zeros(5, dtype=torch.int64)
    uploads.copy_rows(array, rows)
    assert rows.tolist() == [0, 1, 2, 3, 4]
