"""Traces what torch's allocator hands out on the CPU while a function runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Trace:
    """Bytes that the allocator handed out: the largest block, the most at once, and what was not given back.

    Every tensor counts, whoever made it: Python, autograd or a temporary inside an operator.
    """

    largest: int
    peak: int
    kept: int


def trace(function: Callable[[], object]) -> Trace:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return Trace(max(sizes, default=0), peak, live)
