"""From problems to what a kernel reads: the table of fields and the schedule, on the device and cached."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import fields
from .schedule import Schedule

_CACHE_ENTRIES = 2048
_lock = threading.Lock()
_uploaded: OrderedDict[tuple[torch.device, bytes], Tensor] = OrderedDict()


def _copy(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    host = torch.from_numpy(np.array(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A device copy of a small integer array; the same content is uploaded once.

    In a training loop the pointers hardly ever change, so that steps after the first copy nothing.
    """
    key = (device, array.dtype.str.encode() + array.tobytes())
    # Backward passes of several devices run in threads of their own.
    with _lock:
        copied = _uploaded.get(key)
        if copied is None:
            copied = _uploaded[key] = _copy(array, device)
        _uploaded.move_to_end(key)
        while len(_uploaded) > _CACHE_ENTRIES:
            _uploaded.popitem(last=False)
    return copied


@lru_cache(maxsize=2048)
def upload_schedule(schedule: Schedule, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``starts``, ``runs`` and ``order`` on the device."""
    arrays = (schedule.starts, schedule.runs.reshape(-1), schedule.order)
    starts, runs, order = (_copy(array, device) for array in arrays)
    return starts, runs, order


def upload_fields(columns: Mapping[str, Sequence[int]], weights: int, device: torch.device) -> Tensor:
    """The int64 table (weights, fields.WIDTH) with the given columns, 0 elsewhere, flattened."""
    table = np.zeros((weights, fields.WIDTH), np.int64)
    for name, values in columns.items():
        table[:, fields.INDEX[name]] = values
    return upload(table.reshape(-1), device)
