"""Starting a variant through Triton's own compiler and launcher."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .kernels.table import KERNELS, kernel_constants
from .variants import Variant
from .vetting import findings, refusal


def _scratch(device: torch.device) -> Any:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate


# By variant, device, and which pointers are aligned, which Triton compiles for: why it is not launched, "" where it is.
_refusals: dict[tuple[Variant, int, tuple[bool, ...]], str] = {}


def bind_jit(
    variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]
) -> Callable[[], None]:
    """The function that starts a launch. On GPUs whose code is looked at first, it is compiled now.

    Raises:
        ValueError: the code that Triton makes of it for this GPU may compute wrong numbers.
    """
    constants = kernel_constants(variant)
    options = variant.options()
    if device.type != "cuda":
        return lambda: _start(variant, programs, arguments, constants, options)
    if torch.version.hip is None:
        options["maxnreg"] = variant.registers
    with torch.cuda.device(device):
        _check(variant, device, arguments, options)

    def start() -> None:
        # Descriptors made inside a kernel live in scratch memory that Triton asks of its caller.
        triton.set_allocator(_scratch(device))
        with torch.cuda.device(device):
            _start(variant, programs, arguments, constants, options)

    return start


@lru_cache(maxsize=64)
def is_vetted(index: int) -> bool:
    """Whether a CUDA device has products that run on behind their instruction, which only compute capability 9.0 has:
    what Triton compiles for it is looked at first, and may be refused.
    """
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


def _check(variant: Variant, device: torch.device, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    index = torch.cuda.current_device()
    if not is_vetted(index):
        return
    key = (variant, index, tuple(argument.data_ptr() % 16 == 0 for argument in arguments))
    refused = _refusals.get(key)
    if refused is None:
        # Compiled, or taken from Triton's cache, and not launched.
        kernel = KERNELS[variant.kernel].run(
            *arguments, grid=(1,), warmup=True, **kernel_constants(variant), **options
        )  # fmt: skip
        # Triton 3.6 and newer may compile in a thread.
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        found = findings(kernel)
        refused = _refusals[key] = refusal(variant, device, found) if found else ""
    if refused:
        raise ValueError(refused)


def _start(
    variant: Variant,
    programs: int,
    arguments: tuple[Tensor, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    KERNELS[variant.kernel][(programs,)](*arguments, **constants, **options)
