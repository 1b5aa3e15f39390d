"""From problems to what a kernel reads: the table of fields and the schedule, on the device and cached."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import fields
from .schedule import Schedule

_CACHE_ENTRIES = 4096
_lock = threading.Lock()
_uploads: OrderedDict[tuple[torch.device, Hashable], _Upload] = OrderedDict()
# Host memory that captured graphs read at every replay. A graph does not say when it ends, hence for ever: a few
# kilobytes for each launch of each capture.
_replayed: list[Tensor] = []


class _Upload(NamedTuple):
    """Copies on a device, the stream that they were queued on, and the event behind them (None on the CPU)."""

    tensors: tuple[Tensor, ...]
    stream: Any
    event: Any

    def on_current_stream(self, device: torch.device) -> tuple[Tensor, ...]:
        """The copies, which what is queued now on the device's current stream may read."""
        if self.event is not None:
            stream = torch.cuda.current_stream(device)
            if stream != self.stream:
                stream.wait_event(self.event)
                # Else their memory might be given away, once they leave the cache, while this stream still reads.
                for tensor in self.tensors:
                    tensor.record_stream(stream)
        return self.tensors


def _host(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.array(array))
    return host.pin_memory() if device.type == "cuda" else host


def _sent(arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> _Upload:
    tensors = tuple(_host(array, device).to(device, non_blocking=True) for array in arrays)
    if device.type != "cuda":
        return _Upload(tensors, None, None)
    stream = torch.cuda.current_stream(device)
    return _Upload(tensors, stream, stream.record_event())


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def upload(key: Hashable, arrays: Sequence[npt.NDArray[Any]], device: torch.device) -> tuple[Tensor, ...]:
    """Device copies of small integer arrays, for the device's current stream; those of one key are uploaded once.

    In a training loop the pointers hardly ever change, so that steps after the first copy nothing.

    While a CUDA graph is captured, copies become part of it: they hold nothing before its first replay, and what others
    uploaded may be gone by then, so that the cache is neither written nor read.
    """
    if _capturing(device):
        hosts = [_host(array, device) for array in arrays]
        _replayed.extend(hosts)
        return tuple(host.to(device, non_blocking=True) for host in hosts)
    # Backward passes of several devices run in threads of their own.
    with _lock:
        found = _uploads.get((device, key))
        if found is None:
            found = _uploads[device, key] = _sent(arrays, device)
        _uploads.move_to_end((device, key))
        while len(_uploads) > _CACHE_ENTRIES:
            _uploads.popitem(last=False)
    return found.on_current_stream(device)


def upload_schedule(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``starts``, ``runs`` and ``order`` on the device."""
    starts, runs, order = upload(schedule, (schedule.starts, schedule.runs.reshape(-1), schedule.order), device)
    return starts, runs, order


def upload_fields(columns: Mapping[str, Sequence[int]], weights: int, device: torch.device) -> Tensor:
    """The int64 table (weights, fields.WIDTH) with the given columns, 0 elsewhere, flattened."""
    table = np.zeros((weights, fields.WIDTH), np.int64)
    for name, values in columns.items():
        table[:, fields.INDEX[name]] = values
    return upload(table.tobytes(), (table.reshape(-1),), device)[0]
