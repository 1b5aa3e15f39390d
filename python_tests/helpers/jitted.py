"""Launches variants through Triton's JIT for a GPU of compute capability 9.0 that is not there, and prints what became
of each as JSON; in a process of its own, where the compiler is not the interpreter.

    python jitted.py glob-of-labels ...
"""

from __future__ import annotations

import fnmatch
import json
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver

from rpsft_kernels.ops.triton import jit
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import ARGUMENT_TYPES, ARGUMENTS, list_variants

_DTYPES = {"*i64": torch.int64, "*i32": torch.int32, "*fp32": torch.float32}


class Driver(CudaDriver):  # type: ignore[misc]
    """Stands for Triton's driver: knows a device, loads anything, and writes down what is launched."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (1, 2, 32, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32},
        )
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda _: 0
        self.get_device_capability = lambda _: (9, 0)

    def launcher_cls(self, *_: Any) -> Any:
        def launch(*_: Any) -> None:
            self.launches += 1

        return launch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def main() -> None:
    driver = Driver()
    triton.runtime.driver.set_active(driver)
    variants = [
        variant
        for variant in list_variants("sm_90", DESCRIPTORS["sm_90"], rank_classes())
        if any(fnmatch.fnmatchcase(variant.label(), glob) for glob in sys.argv[1:])
    ]

    results = []
    with (
        mock.patch.object(torch.cuda, "device", return_value=nullcontext()),
        mock.patch.object(torch.cuda, "current_device", return_value=0),
        mock.patch.object(torch.cuda, "get_device_capability", return_value=(9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", return_value="a GPU"),
    ):
        for variant in variants:
            arguments = tuple(torch.zeros(8, dtype=_DTYPES[ARGUMENT_TYPES[n]]) for n in ARGUMENTS[variant.kernel])
            said = []
            for _ in range(2):
                try:
                    jit.bind_jit(variant, 1, torch.device("cuda", 0), arguments)()
                except ValueError as error:
                    said.append(str(error))
            results.append({"label": variant.label(), "launches": driver.launches, "said": said})
            driver.launches = 0
    print(json.dumps(results))


if __name__ == "__main__":
    main()
