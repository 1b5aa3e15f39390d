"""Memory that the launches of one operation fill and read, and that the next operation of the same stream reuses."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """Elements of each buffer. ``planes``: T, later P, in bfloat16; in float32 ``partial``: split sums of C, ``slots``:
    sums of squares of tiles, ``drifts``: C of the weights of a batch.
    """

    planes: int = 0
    partial: int = 0
    slots: int = 0
    drifts: int = 0


class Scratch:
    """The buffers of one stream. A caller that queues an operation holds ``lock`` until all its launches are queued.

    ``generation`` counts how often a buffer has moved.
    """

    def __init__(self, device: torch.device) -> None:
        self.lock = threading.RLock()
        self.generation = 0
        self._device = device
        self._sizes = Sizes()
        self.planes, self.partial, self.slots, self.drifts = map(self._empty, Sizes._fields, self._sizes)

    def _empty(self, name: str, size: int) -> Tensor:
        dtype = torch.bfloat16 if name == "planes" else torch.float32
        # Later calls may be outside of inference mode.
        with torch.inference_mode(False):
            return torch.empty(size, dtype=dtype, device=self._device)

    def reserve(self, sizes: Sizes) -> None:
        """Make every buffer at least as large as ``sizes`` say. Call it on their own stream."""
        wanted = Sizes(*map(max, self._sizes, sizes))
        if wanted == self._sizes:
            return
        # This comes first: if there is no memory, launches that were bound to the old buffers are stale all the same.
        self.generation += 1
        for name, size in zip(Sizes._fields, wanted, strict=True):
            if size > getattr(self._sizes, name):
                # The old buffer goes first, because both need not fit.
                setattr(self, name, self._empty(name, 0))
                self._sizes = self._sizes._replace(**{name: 0})
                setattr(self, name, self._empty(name, size))
                self._sizes = self._sizes._replace(**{name: size})

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in (self.planes, self.partial, self.slots, self.drifts))


# A scratch memory is freed with the last run that uses it.
_scratches: weakref.WeakValueDictionary[tuple[torch.device, int], Scratch] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def scratch_of(device: torch.device, stream: int) -> Scratch:
    """The scratch memory of a stream, by its handle."""
    with _lock:
        scratch = _scratches.get((device, stream))
        if scratch is None:
            scratch = _scratches[device, stream] = Scratch(device)
        return scratch
