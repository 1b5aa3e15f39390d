"""Starting one variant: the only place where a kernel is called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from .aot import dispatch as aot
from .device import own_profile
from .tile_table import rank_classes, tuned_architecture
from .variants import Variant


class Watcher(Protocol):
    """What is told of every launch of a thread."""

    def launched(self, variant: Variant, programs: int, arguments: Sequence[Tensor]) -> None: ...

    def refused(self, variant: Variant, error: Exception) -> None:
        """Nothing was launched: this installation has no kernel that may run, and ``error`` says why."""


_watcher: ContextVar[Watcher | None] = ContextVar("rpsft_launches", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Tell ``watcher`` of every launch that this thread makes inside the ``with`` block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


_rehearsed: ContextVar[bool] = ContextVar("rpsft_rehearsed", default=False)


@contextmanager
def rehearsed() -> Iterator[None]:
    """Launch nothing inside the ``with`` block, but raise what a launch would raise for want of code that may run."""
    token = _rehearsed.set(True)
    try:
        yield
    finally:
        _rehearsed.reset(token)


@lru_cache(maxsize=64)
def is_vetted(index: int) -> bool:
    """Whether a CUDA device has products that run on behind their instruction, which only compute capability 9.0 has:
    what Triton compiles for it is looked at first, and may be refused.
    """
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


def may_refuse(device: torch.device) -> bool:
    """Whether a launch may turn out to have no code that may run."""
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    if not is_vetted(index) and aot.compiles():
        return False
    found = aot.service(device, own_profile(device).architecture, tuned_architecture())
    return found is None or not aot.complete(found, rank_classes())


def launch(variant: Variant, programs: int, device: torch.device, *arguments: Tensor) -> None:
    """Run ``programs`` programs of a variant on the current stream of ``device``; nothing to do for none.

    A kernel compiled ahead of time serves the launch where there is one, else Triton compiles it.
    """
    if programs == 0:
        return
    if _rehearsed.get():
        _rehearse(variant, device, arguments)
        return
    watcher = _watcher.get()
    if watcher is None:
        _start(variant, programs, device, arguments)
        return
    try:
        _start(variant, programs, device, arguments)
    except (aot.NoKernel, ValueError) as error:
        watcher.refused(variant, error)
        raise
    watcher.launched(variant, programs, arguments)


def _start(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> None:
    if device.type == "cuda" and aot.start(variant, programs, device, arguments):
        return
    # Here, not above: triton is imported for what only it can launch.
    from .jit import launch_jit

    launch_jit(variant, programs, device, arguments)


def _rehearse(variant: Variant, device: torch.device, arguments: tuple[Tensor, ...]) -> None:
    if device.type != "cuda" or aot.serves(variant, device):
        return
    from .jit import check_jit

    check_jit(variant, device, arguments)
