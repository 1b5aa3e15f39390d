"""Times calls on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from ...ops.triton.waiting import wait_for_stream

# Milliseconds that a call takes.
Timer = Callable[[Callable[[], None]], float]


class EventTimer:
    """Times a call on a GPU by CUDA events: the median of many runs, each with nothing of it in the GPU's caches."""

    # Milliseconds to spend on one call, and the fewest and most runs.
    _SPENT, _FEWEST, _MOST = 40.0, 5, 60
    # Larger than any cache; the milliseconds that the fastest memory takes to fill it.
    _FLUSHED, _FLUSH_TIME = 1 << 28, 0.03

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.empty(self._FLUSHED, dtype=torch.int8, device=device)

    def __call__(self, run: Callable[[], None]) -> float:
        with torch.cuda.device(self._device):
            (estimate,) = self._time_runs(run, 1, 1)
            began = time.perf_counter()
            run()
            queueing = 1e3 * (time.perf_counter() - began)
            # While the caches are flushed the host gets ahead: no launch is to wait for it.
            flushes = 1 + int(queueing / self._FLUSH_TIME)
            runs = int(self._SPENT / max(estimate, 1e-3))
            return statistics.median(self._time_runs(run, min(self._MOST, max(self._FEWEST, runs)), flushes))

    def _time_runs(self, run: Callable[[], None], count: int, flushes: int) -> list[float]:
        pairs = []
        for _ in range(count):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            for _ in range(flushes):
                self._memory.zero_()
            begin.record()
            run()
            end.record()
            pairs.append((begin, end))
        wait_for_stream(self._device)
        return [begin.elapsed_time(end) for begin, end in pairs]
