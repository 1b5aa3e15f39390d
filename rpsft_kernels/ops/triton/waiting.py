"""Waits for a GPU that have an end: where a kernel never ends, an ordinary wait never returns, and cannot say why."""

from __future__ import annotations

import time

import torch

# Seconds after which a launch that should take milliseconds is taken for one that never ends.
PATIENCE = 60.0
# Seconds between two looks at an event: at first, and at most.
_SHORTEST, _LONGEST = 1e-5, 0.02


class Stalled(RuntimeError):
    """A GPU does not come to the end of what was queued. Nothing else can be done with it in this process."""


def wait_for_stream(device: torch.device, patience: float = PATIENCE) -> None:
    """Wait until all that is queued on the current stream of ``device``, a GPU, has ended.

    Raises:
        Stalled: it has not after ``patience`` seconds.
        RuntimeError: it has failed.
    """
    event = torch.cuda.current_stream(device).record_event()
    deadline = time.monotonic() + patience
    pause = _SHORTEST
    while True:
        # The clock comes first: a process that was stopped for a while looks once more.
        late = time.monotonic() > deadline
        if event.query():
            return
        if late:
            raise Stalled(f"{device} has not come to the end of its launches within {patience:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
