"""The GPUs of this machine, read from their driver without torch or a CUDA toolkit.

This file needs only the standard library: setup.py imports it where torch is not installed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

_SUCCESS = 0
_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76


class NoDevices(Exception):
    """No GPU was found; the message says why."""


def compute_capabilities() -> list[int]:
    """The compute capabilities of this machine's GPUs, each once, in ascending order (``90`` for 9.0).

    The driver's library is libcuda.so.1, or the one that the environment variable RPSFT_CUDA_DRIVER names. The driver
    hides GPUs that CUDA_VISIBLE_DEVICES leaves out.

    Raises:
        NoDevices: there is no driver, or it finds no GPU or fails; the message says which.
    """
    if sys.platform != "linux":
        raise NoDevices(f"kernels compiled ahead of time are launched on Linux only, and this is {sys.platform}")
    name = os.environ.get("RPSFT_CUDA_DRIVER") or "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise NoDevices(f"no CUDA driver: {name!r} does not open ({error})") from None
    _call(driver, "cuInit", ctypes.c_uint(0))
    count = ctypes.c_int()
    _call(driver, "cuDeviceGetCount", ctypes.byref(count))
    if not count.value:
        raise NoDevices("the CUDA driver finds no GPU")
    return sorted({_capability(driver, ordinal) for ordinal in range(count.value)})


def _capability(driver: ctypes.CDLL, ordinal: int) -> int:
    device, value = ctypes.c_int(), ctypes.c_int()
    _call(driver, "cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        _call(driver, "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), device)
        numbers.append(value.value)
    return 10 * numbers[0] + numbers[1]


def _call(driver: ctypes.CDLL, name: str, *arguments: Any) -> None:
    try:
        result = getattr(driver, name)(*arguments)
    except AttributeError:
        raise NoDevices(f"no CUDA driver: its library has no function {name}") from None
    if result == _NO_DEVICE:
        raise NoDevices("the CUDA driver finds no GPU")
    if result != _SUCCESS:
        raise NoDevices(f"the CUDA driver fails: {name} returned {result}")
