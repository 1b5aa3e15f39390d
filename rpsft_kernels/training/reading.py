"""Numbers of a device that are needed on the host one step later, so that no step waits for its own."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """Numbers on their way to the host. They are copied at once, so that the tensor may change.

    Args:
        values: a floating tensor of any shape, on any device.
    """

    def __init__(self, values: Tensor) -> None:
        values = values.detach()
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cuda":
            self._host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
            self._host.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(values.device))
        else:
            self._host = values.clone()

    @property
    def arrived(self) -> bool:
        """Whether :meth:`read` returns without waiting."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def read(self) -> list[float]:
        """Return the numbers in row-major order; waits for the device until they have been computed."""
        if self._event is not None:
            self._event.synchronize()
        numbers: list[float] = self._host.reshape(-1).tolist()
        return numbers
