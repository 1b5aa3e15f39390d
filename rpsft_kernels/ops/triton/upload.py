"""Sends small arrays to a device: schedules, which are cached there, and rows of tables.

Nothing here waits for a GPU: arrays are sent from pinned memory, one copy for each key.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .schedule import Schedule

_CACHE_ENTRIES = 4096
# Arrays that travel together begin at multiples of this many bytes, as fresh tensors do for the kernels' vectors.
ALIGNMENT = 256
_SMALLEST_RESERVE = 1 << 20
_lock = threading.Lock()
_uploads: OrderedDict[tuple[torch.device, Hashable], _Upload] = OrderedDict()
# Host memory that captured graphs read at every replay, by its content. It is kept for ever, because a graph does not
# say when it ends: a few kilobytes for each launch of each capture.
_replayed: dict[Hashable, Tensor] = {}
_cached_bytes = 0
_DTYPES = {np.int32: torch.int32, np.int64: torch.int64, np.float32: torch.float32}


class _Upload(NamedTuple):
    """A copy on a device, its arrays, the stream that it was queued on, and the event behind it (None on the CPU)."""

    memory: Tensor
    tensors: tuple[Tensor, ...]
    stream: Any
    event: Any

    def on_current_stream(self, device: torch.device) -> tuple[Tensor, ...]:
        """The arrays, which work that is queued now on the device's current stream may read."""
        if self.event is not None:
            stream = torch.cuda.current_stream(device)
            if stream != self.stream:
                stream.wait_event(self.event)
                # Otherwise the memory might be reused, once it leaves the cache, while this stream still reads it.
                self.memory.record_stream(stream)
        return self.tensors


class _CaptureReserve:
    """Pinned memory set aside for the captures to come.

    While a graph is captured, CUDA allows no allocation of pinned memory and no look at an event, which torch's
    allocator of pinned memory takes before it gives any. So there is always as much free as the cache holds: a step
    that has run outside of a capture has sent all that its capture will send.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def ensure(self, size: int) -> None:
        """Allocate memory unless ``size`` bytes are free. This must not be called while a graph is captured."""
        # Operators that are called by themselves leave no table to be counted: half the smallest reserve is for them.
        if self._free.numel() < max(size, _SMALLEST_RESERVE // 2):
            # Graphs that read memory taken before keep it alive.
            self._free = _allocate_pinned(max(_SMALLEST_RESERVE, 1 << size.bit_length()))

    def take(self, size: int) -> Tensor:
        """``size`` bytes, which are never given back.

        Raises:
            RuntimeError: fewer are free.
        """
        if size > self._free.numel():
            raise RuntimeError(
                f"CUDA graph: got a capture that needs {size} more bytes of pinned memory for the kernels' tables, of "
                f"which {self._free.numel()} are set aside; expected the same step to have run outside of a capture "
                "before, which sets them aside: run it once before each capture"
            )
        taken, self._free = self._free[:size], self._free[-(-size // ALIGNMENT) * ALIGNMENT :]
        return taken


_reserve = _CaptureReserve()


def _allocate_pinned(size: int) -> Tensor:
    # The caller may have set any mode and default device.
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _queue_copy(host: Tensor, device: torch.device) -> Tensor:
    return host.to(device, non_blocking=True)


def _pack(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """The bytes of all arrays, each at a multiple of the alignment."""
    packed = np.zeros(sum(map(_padded_bytes, arrays)), np.uint8)
    begin = 0
    for array in arrays:
        packed[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        begin += _padded_bytes(array)
    return packed


def _unpack(memory: Tensor, arrays: Sequence[npt.NDArray[Any]]) -> tuple[Tensor, ...]:
    unpacked, begin = [], 0
    for array in arrays:
        unpacked.append(memory[begin : begin + array.nbytes].view(_DTYPES[array.dtype.type]))
        begin += _padded_bytes(array)
    return tuple(unpacked)


def _padded_bytes(array: npt.NDArray[Any]) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT


def _send(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> _Upload:
    packed = torch.from_numpy(_pack(arrays))
    if device.type != "cuda":
        return _Upload(packed, _unpack(packed, arrays), None, None)
    # torch gives a pinned buffer to others only when the copies out of it are done.
    memory = _queue_copy(_allocate_pinned(packed.numel()).copy_(packed), device)
    stream = torch.cuda.current_stream(device)
    return _Upload(memory, _unpack(memory, arrays), stream, stream.record_event())


def _send_in_capture(key: Hashable, arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    host = _replayed.get(key)
    if host is None:
        packed = torch.from_numpy(_pack(arrays))
        host = _replayed[key] = _reserve.take(packed.numel()).copy_(packed)
    return _unpack(_queue_copy(host, device), arrays)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the device's current stream."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def upload(key: Hashable, arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Device copies of small arrays, flattened, for the device's current stream; those of one key are uploaded once.

    In a training loop the pointers hardly ever change, so that steps after the first copy nothing.

    While a CUDA graph is captured, copies become part of it: they hold nothing before its first replay, and what others
    uploaded may be gone by then, so that the cache is neither written nor read. The device memory is the graph's own:
    memory that is freed within a capture is given to later work of the same capture alone, which runs later at each
    replay too, so that tables, workspaces and the kernels' scratch memory need not outlive their launches.

    Raises:
        RuntimeError: a graph is captured and no such step has run before.
    """
    global _cached_bytes
    # Backward passes of several devices run in threads of their own.
    with _lock:
        if is_capturing(device):
            return _send_in_capture(key, arrays, device)
        sent = _uploads.get((device, key))
        if sent is None:
            sent = _uploads[device, key] = _send(arrays, device)
            _cached_bytes += sent.memory.numel()
        _uploads.move_to_end((device, key))
        while len(_uploads) > _CACHE_ENTRIES:
            _cached_bytes -= _uploads.popitem(last=False)[1].memory.numel()
        if device.type == "cuda":
            _reserve.ensure(_cached_bytes)
    return sent.on_current_stream(device)


def upload_schedule(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``starts``, ``runs`` and ``order`` on the device."""
    starts, runs, order = upload(schedule, (schedule.starts, schedule.runs, schedule.order), device)
    return starts, runs, order


def copy_rows(source: npt.NDArray[Any], target: Tensor) -> None:
    """Queue a copy of ``source`` to ``target``, which lies on a device and has as many elements of the same size.

    While a CUDA graph is captured, the copy becomes part of it, and its source is kept for every replay.

    Raises:
        RuntimeError: a graph is captured and no such step has run before.
    """
    packed = torch.from_numpy(np.ascontiguousarray(source).reshape(-1).view(np.uint8))
    memory = target.view(torch.uint8)
    if target.device.type != "cuda":
        memory.copy_(packed)
        return
    with _lock:
        if is_capturing(target.device):
            content = source.tobytes()
            host = _replayed.get(content)
            if host is None:
                host = _replayed[content] = _reserve.take(packed.numel()).copy_(packed)
        else:
            host = _allocate_pinned(packed.numel()).copy_(packed)
    memory.copy_(host, non_blocking=True)


def reserve_for_captures() -> None:
    """Set aside pinned memory for the tables that a capture of the steps so far would send.

    This must not be called while a graph is captured.
    """
    with _lock:
        # A captured backward pass has tables of its own, for operations that the forward pass has sent too.
        _reserve.ensure(_cached_bytes + 2 * sum(table.nbytes for table in list(_tables)))


class SentTable(Protocol):
    """A table that a step sends, and a capture of the step would send again."""

    @property
    def nbytes(self) -> int: ...


_tables: weakref.WeakSet[SentTable] = weakref.WeakSet()


def register_table(table: SentTable) -> None:
    """Count ``table`` among the tables that captures send, as long as it lives."""
    with _lock:
        _tables.add(table)
