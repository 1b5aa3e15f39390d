"""Starting a variant through Triton's own compiler and launcher."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .kernels import KERNELS, kernel_constants
from .variant import Variant


def _scratch(device: torch.device) -> Any:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate


def launch_jit(variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]) -> None:
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
    KERNELS[variant.kernel][(programs,)](*arguments, **kernel_constants(variant), **options)
