"""Runs the planners' launches on the compiled PTX of each variant, by the emulator in ``ptxrun``."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compiling import Compiler
from planned import planned_for
from ptxrun import GlobalMemory, Stats, region_of, run
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.variants import ARGUMENTS, Variant

# Few, so that a program walks several tiles and weights.
MULTIPROCESSORS = 3
# The version of the compiler, and whether its kernels are those that are released. None without one.
COMPILER = tuple(map(int, re.findall(r"\d+", importlib.metadata.version("triton"))[:2])) if find_spec("triton") else ()
NEWEST = COMPILER >= (3, 9) and not torch.cuda.is_available()
WHY_NEWEST = "kernels of Triton 3.9 and newer are emulated, and where there is a GPU the kernels themselves run"
_ALLOCATIONS = {"empty", "new_empty", "empty_like"}


def profile_of(architecture: str) -> Profile:
    """An architecture with few multiprocessors."""
    return Profile(architecture, MULTIPROCESSORS, DESCRIPTORS[architecture])


class Emulator(TorchFunctionMode):
    """A GPU made of the CPU: inside ``with Emulator(...)`` kernels run on PTX.

    A kernel may touch the tensors that are ``given`` and those that the launcher makes. What ``torch.empty`` gives
    holds nothing until a kernel writes it, or PyTorch in place. ``stats`` is of every launch.
    """

    def __init__(self, architecture: str, compiler: Compiler, order: str = "forward") -> None:
        super().__init__()
        self.memory = GlobalMemory(check_races=True)
        self.stats: list[tuple[Variant, Stats]] = []
        self._architecture, self._compiler, self._order = architecture, compiler, order
        self._planned: Any = None

    def give(self, *tensors: Tensor, unwritten: bool = False) -> None:
        """Tensors that kernels may read; or that hold nothing yet."""
        for tensor in tensors:
            self.memory.add(region_of(tensor, f"given {tuple(tensor.shape)}", unwritten))

    def unwritten_bytes(self, tensor: Tensor) -> int:
        """Count the bytes of a new tensor that no kernel wrote."""
        return int(np.count_nonzero(~self._written(tensor)))

    def __enter__(self) -> Emulator:
        self._planned = planned_for(profile_of(self._architecture), self._launch)
        self._planned.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._planned.__exit__(*exception)

    def __torch_function__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if isinstance(result, Tensor) and result.numel():
            if name in _ALLOCATIONS:
                self.memory.add(region_of(result, f"{name} {tuple(result.shape)}", unwritten=True))
            else:
                self.memory.add_new(region_of(result, f"result of {name}"))
                if name.endswith("_") and not name.startswith("_"):
                    self._written(result)[...] = True
        return result

    def _written(self, tensor: Tensor) -> npt.NDArray[np.bool_]:
        """Tell for every byte of a tensor whether it was written: a view, or a copy where all of its memory was."""
        region = self.memory.find(tensor.data_ptr())
        itemsize = tensor.element_size()
        shape = (*tensor.shape, itemsize)
        if region is None or region.written is None:
            return np.ones(shape, bool)
        strides = [stride * itemsize for stride in tensor.stride()]
        start = tensor.data_ptr() - region.base
        return np.lib.stride_tricks.as_strided(region.written[start:], shape, (*strides, 1))

    def _launch(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        kernel = self._compiler.compile(variant, self._architecture)
        # A piece of the scratch memory for each program.
        scratch = torch.empty(programs * kernel.scratch + kernel.scratch_align, dtype=torch.uint8)
        offset = -scratch.data_ptr() % max(1, kernel.scratch_align)
        names = ARGUMENTS[variant.kernel]
        assert len(arguments) == len(names)
        for name, tensor in zip(names, arguments, strict=True):
            self.memory.add_new(region_of(tensor, name))
        pointers = [*(tensor.data_ptr() for tensor in arguments), scratch.data_ptr() + offset, 0]
        stats = run(
            kernel.ptx, (programs,), pointers, kernel.warps, kernel.shared, memory=self.memory, order=self._order
        )
        self.stats.append((variant, stats))
