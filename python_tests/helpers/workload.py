"""One forward and backward pass of several weights, and every launch that it makes.

``python workload.py <kernels> <table> <stand-in>`` runs it with the package's own launcher over the stand-in for the
driver, on a made-up GPU whose memory is the host's, and prints what was launched beside what the driver was asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from planned import profiled
from rpsft_kernels.ops import Operands
from rpsft_kernels.ops.triton import backend
from rpsft_kernels.ops.triton import launch as triton_launch
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.variants import Variant

DEVICE, STREAM, MULTIPROCESSORS = 1, 0x7700, 8


class Workload:
    """A wide, a tall and a small weight with subspaces of 32, and one that is anchored in full."""

    def __init__(self) -> None:
        bf16 = torch.bfloat16
        # Rows enough for a reduction that is split.
        self.weights = [torch.zeros(*shape, dtype=bf16) for shape in ((4096, 4160), (192, 128), (64, 64))]
        self.bases = [torch.zeros_like(weight) for weight in self.weights]
        self.lefts = [torch.zeros(weight.shape[0], 32, dtype=bf16) for weight in self.weights]
        self.rights = [torch.zeros(weight.shape[1], 32, dtype=bf16) for weight in self.weights]
        self.grads = [torch.zeros(weight.shape) for weight in self.weights]
        self.full, self.full_base = (torch.zeros(96, 128, dtype=bf16) for _ in range(2))
        self.full_grad = torch.zeros(96, 128)
        self.scales = torch.ones(len(self.weights))

    def addresses(self) -> dict[str, list[int]]:
        names = ("weights", "bases", "lefts", "rights", "grads")
        return {name: [tensor.data_ptr() for tensor in getattr(self, name)] for name in names}

    def run(self) -> None:
        drifts, _ = backend.project_drift(Operands(self.weights, self.lefts, self.rights, self.bases))
        subspaces = Operands(lefts=self.lefts, rights=self.rights)
        backend.pull_back_into(self.grads, subspaces, drifts, self.scales, True)
        full = Operands([self.full], pretrained=[self.full_base])
        backend.project_drift(full)
        backend.pull_back_into([self.full_grad], full, [torch.empty(0, 0)], self.scales[:1], True)


def profile_of(table: str) -> Profile:
    return Profile(table, MULTIPROCESSORS, DESCRIPTORS[table])


def main(folder: str, table: str, driver: str) -> None:
    import ctypes

    from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
    from rpsft_kernels.ops.triton.aot.library import Device, Library
    from rpsft_kernels.ops.triton.variants import ARGUMENTS

    library = Library.open(Path(folder))
    scratch: list[Tensor] = []
    launches: list[dict[str, Any]] = []

    def allocate(size: int, device: torch.device) -> Tensor:
        assert device.index == DEVICE
        # One byte off, so that the launcher has to find the boundary itself; the last byte stays inside.
        scratch.append(torch.zeros(size + 1, dtype=torch.int8))
        return scratch[-1][1:]

    vars(aot_dispatch).update(
        _open_installed=lambda: (library, None),
        _descriptor_scratch=allocate,
        _device_facts=lambda index: Device(int(table[3:]), 227 << 10, 12040),
    )
    torch.cuda.current_stream = lambda device: SimpleNamespace(cuda_stream=STREAM + device.index)  # type: ignore

    def find_start(
        variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]
    ) -> Callable[[], None]:
        before = len(scratch)
        start = aot_dispatch.bind(variant, programs, torch.device("cuda", DEVICE), arguments)
        assert start is not None
        own_scratch = [(memory.data_ptr(), memory.numel()) for memory in scratch[before:]]
        names = ARGUMENTS[variant.kernel]

        def noted() -> None:
            start()
            launches.append(
                {
                    "label": variant.label(),
                    "programs": programs,
                    "arguments": {n: t.data_ptr() for n, t in zip(names, arguments, strict=True)},
                    "table": arguments[0].tolist(),
                    "scratch": own_scratch,
                }
            )

        return noted

    workload = Workload()
    triton_launch.find_start = find_start
    with profiled(profile_of(table)):
        workload.run()
    stub = ctypes.CDLL(driver)
    text = ctypes.create_string_buffer(stub.stub_log(None, 0) + 1)
    stub.stub_log(text, len(text))
    calls = [json.loads(line) for line in text.value.decode().splitlines()]
    print(json.dumps({"launches": launches, "calls": calls, "addresses": workload.addresses()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
