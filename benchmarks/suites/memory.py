"""Peak memory of one step on a CPU, for a process of its own. Linux only: the kernel keeps the peak."""

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
# glibc's name of the size from which on memory comes from the system, and at once goes back to it.
_M_MMAP_THRESHOLD = -3
_LARGE = 128 << 10


def supported() -> bool:
    return _STATUS.exists() and Path("/proc/self/clear_refs").exists()


def _status(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS}: got no {field}, expected Linux")
    return int(found[1]) * 1024


def extra_bytes(name: str, shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, threads: int) -> int:
    """What one step of provider ``name`` holds at its peak beyond weights, anchors and existing gradients.

    Workspace that a provider keeps for later steps counts; memory that is free but still glibc's does not, as that is
    chance. Pages of libraries that the step touches first are not counted. What compiles is compiled before; what it
    keeps of its first run is not counted either.
    """
    c_library = ctypes.CDLL(None)
    # Fixed: left to itself it grows with what is freed.
    c_library.mallopt(_M_MMAP_THRESHOLD, _LARGE)
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    provider = next(found for found in providers(cpu, dtype, compiling=False) if found.name == name)
    # Values do not matter to memory, and constants are made faster than bases.
    if not provider.compiled:
        # What a thread keeps goes with it.
        first = threading.Thread(target=lambda: provider(Layer(_TINY, 64, dtype, 1, cpu, flat=True))())
        first.start()
        first.join()
    step = provider(Layer(shapes, rank, dtype, 0, cpu, flat=True))
    if provider.compiled:
        step()
    gc.collect()
    # What building the layer freed would otherwise serve the step without showing.
    c_library.malloc_trim(0)
    resident, mapped = _status("VmRSS"), _status("RssFile")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return max(0, _status("VmHWM") - resident - (_status("RssFile") - mapped))
