"""Starting one variant: the only place where a kernel is called."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import aot
from .variant import Variant


def launch(variant: Variant, programs: int, device: torch.device, *arguments: Tensor) -> None:
    """Run ``programs`` programs of a variant on the current stream of ``device``; nothing to do for none.

    A kernel compiled ahead of time serves the launch where there is one, else Triton compiles it.
    """
    if programs == 0 or (device.type == "cuda" and aot.start(variant, programs, device, arguments)):
        return
    # Here, not above: triton is imported for what only it can launch.
    from .jit import launch_jit

    launch_jit(variant, programs, device, arguments)
