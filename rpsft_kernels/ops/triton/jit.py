"""Starts variants through Triton's own compiler and launcher."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from .kernels.table import KERNELS, kernel_constants
from .variants import Variant
from .vetting import explain_refusal, find_faults


def _scratch_allocator(device: torch.device) -> Any:
    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    return allocate


# The reasons not to launch what Triton compiles, None where it is launched; by variant, device, and which pointers are
# aligned, because Triton compiles anew for these.
_refusals: dict[tuple[Variant, int, tuple[bool, ...]], str | None] = {}


def bind_jit(
    variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]
) -> Callable[[], None]:
    """The function that starts a launch. On GPUs whose code is vetted, the kernel is compiled now.

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
        triton.set_allocator(_scratch_allocator(device))
        with torch.cuda.device(device):
            _start(variant, programs, arguments, constants, options)

    return start


@lru_cache(maxsize=64)
def is_vetted(index: int) -> bool:
    """Whether code that Triton compiles for a CUDA device is scanned before its first launch, and may be refused.

    Only on compute capability 9.0 do products run on after their instruction.
    """
    return torch.version.hip is None and torch.cuda.get_device_capability(index)[0] == 9


def _check(variant: Variant, device: torch.device, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    index = torch.cuda.current_device()
    if not is_vetted(index):
        return
    key = (variant, index, tuple(argument.data_ptr() % 16 == 0 for argument in arguments))
    if key not in _refusals:
        # Compiled, or taken from Triton's cache, and not launched.
        jitted, constants = KERNELS[variant.kernel], kernel_constants(variant)
        kernel = jitted.run(*arguments, grid=(1,), warmup=True, **constants, **options)
        # Triton 3.6 and newer may compile in a thread.
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        _refusals[key] = explain_refusal(variant, device, find_faults(kernel))
    refusal = _refusals[key]
    if refusal is not None:
        raise ValueError(refusal)


def _start(
    variant: Variant,
    programs: int,
    arguments: tuple[Tensor, ...],
    constants: dict[str, Any],
    options: dict[str, Any],
) -> None:
    KERNELS[variant.kernel][(programs,)](*arguments, **constants, **options)
