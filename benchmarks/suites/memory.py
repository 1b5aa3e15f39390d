"""Measures the peak memory of one step on a CPU, in a process of its own. Linux only: the kernel keeps the peak."""

from __future__ import annotations

import ctypes
import gc
import re
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.suites.layer import Layer
from benchmarks.suites.providers import providers

# A wide and a tall weight: enough to load libraries and start threads before memory is measured.
_TINY = ((256, 384), (384, 256))
_STATUS = Path("/proc/self/status")
# glibc's parameter for the size from which memory comes from the system, and goes back to it when freed.
_M_MMAP_THRESHOLD = -3
_LARGE = 128 << 10


def is_supported() -> bool:
    return _STATUS.exists() and Path("/proc/self/clear_refs").exists()


def _read_status(field: str) -> int:
    """Read one field of /proc/self/status, in bytes."""
    match = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS}: got no {field}, expected Linux")
    return int(match[1]) * 1024


def measure_extra_bytes(
    name: str, shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, threads: int
) -> int:
    """Measure the peak memory of one step of provider ``name`` beyond weights, anchors and existing gradients.

    Workspace that a provider keeps for later steps counts; free memory that glibc holds does not, as it varies by
    chance. Pages of libraries that the step touches first do not count. A provider that compiles has run once before,
    and memory that it keeps of that run does not count either.
    """
    c_library = ctypes.CDLL(None)
    # It is fixed, because by default it grows as memory is freed.
    c_library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    provider = next(provider for provider in providers(cpu, dtype, compiling=False) if provider.name == name)
    # Memory does not depend on values, and constants are made faster than orthonormal U and V.
    if not provider.compiled:
        # Memory that a thread keeps is freed when it ends.
        first = threading.Thread(target=lambda: provider(Layer(_TINY, 64, dtype, 1, cpu, flat=True))())
        first.start()
        first.join()
    step = provider(Layer(shapes, rank, dtype, 0, cpu, flat=True))
    if provider.compiled:
        step()
    gc.collect()
    # Otherwise the step could use memory that was freed while the layer was built, and that would not show.
    c_library.malloc_trim(0)
    resident, mapped = _read_status("VmRSS"), _read_status("RssFile")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return max(0, _read_status("VmHWM") - resident - (_read_status("RssFile") - mapped))
