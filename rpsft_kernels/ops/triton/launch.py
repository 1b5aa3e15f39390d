"""Prepared launches: the only place where a kernel is started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch
from torch import Tensor

from .aot import dispatch as aot
from .variants import Variant


class Watcher(Protocol):
    """Is called at every launch of a thread."""

    def on_launch(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        """A launch has been queued."""

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        """Nothing will be launched: this installation has no kernel that may run, and ``error`` says why."""


_watcher: ContextVar[Watcher | None] = ContextVar("rpsft_launches", default=None)


@contextmanager
def watch_launches(watcher: Watcher) -> Iterator[None]:
    """Call ``watcher`` at every launch that this thread makes inside the ``with`` block."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


class Launch:
    """``programs`` programs of a variant on the stream of ``device`` that is current when it is prepared.

    Without programs there is nothing to do. A kernel compiled ahead of time serves it where there is one, else Triton
    compiles it.

    Raises:
        NoKernel: no kernel serves it, and nothing may or can compile one.
        ValueError: the code that Triton makes of it for this GPU may compute wrong numbers.
    """

    __slots__ = ("_start", "arguments", "device", "programs", "variant")

    def __init__(self, variant: Variant, programs: int, device: torch.device, *arguments: Tensor) -> None:
        self.variant, self.programs, self.device, self.arguments = variant, programs, device, arguments
        self._start = self._find() if programs else None

    def __call__(self) -> None:
        """Queue the launch.

        Raises:
            RuntimeError: the driver could not start it.
        """
        if self._start is None:
            return
        try:
            self._start()
        except aot.ImageRefused:
            # The driver may take another image of this kernel; else Triton compiles it.
            self._start = self._find()
            self()
            return
        watcher = _watcher.get()
        if watcher is not None:
            watcher.on_launch(self.variant, self.programs, self.arguments)

    def _find(self) -> Callable[[], None]:
        try:
            return find_start(self.variant, self.programs, self.device, self.arguments)
        except (aot.NoKernel, ValueError) as error:
            watcher = _watcher.get()
            if watcher is not None:
                watcher.on_refusal(self.variant, error)
            raise


def find_start(
    variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]
) -> Callable[[], None]:
    """The function that starts a launch, once everything that may be refused has been checked."""
    if device.type == "cuda":
        start = aot.bind(variant, programs, device, arguments)
        if start is not None:
            return start
    # This is imported late: triton is not needed for kernels compiled ahead of time.
    from .jit import bind_jit

    return bind_jit(variant, programs, device, arguments)
