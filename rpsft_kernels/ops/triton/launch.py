"""Starting one variant: the only place where a kernel is called."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .variant import KERNELS, Variant


def _scratch(device: torch.device) -> Any:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate


def launch(variant: Variant, programs: int, device: torch.device, *arguments: Tensor) -> None:
    """Run ``programs`` programs of a variant on the current stream of ``device``; nothing to do for none."""
    if programs == 0:
        return
    if device.type == "cuda":
        # Descriptors made inside a kernel live in scratch memory that Triton asks of its caller.
        triton.set_allocator(_scratch(device))
        with torch.cuda.device(device):
            options = variant.options()
            if torch.version.hip is None:
                options["maxnreg"] = variant.registers
            _start(variant, programs, arguments, options)
    else:
        _start(variant, programs, arguments, variant.options())


def _start(variant: Variant, programs: int, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    KERNELS[variant.kernel][(programs,)](*arguments, **dict(variant.constants), **options)
