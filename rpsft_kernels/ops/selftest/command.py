"""``python -m rpsft_kernels selftest`` runs and prints everything that can be tested on a device."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext

import torch

from . import record
from .report import format_table
from .subjects import list_jobs

# On a terminal the command shows its progress after so many cases.
_STEP = 50


def test_device(device: torch.device, quick: bool) -> int:
    """Test the backends that run on a device, and print the results; on a GPU a pass is recorded.

    Returns:
        The exit status: 0 where all passed, 1 where something failed, or where there was nothing to test.
    """
    if device.type not in ("cpu", "cuda"):
        print(f"--device: got {device}, expected a GPU (cuda, cuda:1) or cpu")
        return 1
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            expected = _describe_devices(count)
            print(f"--device: got {device}, expected {expected}; python -m rpsft_kernels env says what is here")
            return 1
        device = torch.device("cuda", device.index or 0)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        jobs, untested = list_jobs(device, quick)
        results = []
        for job in jobs:
            total = len(job.cases)

            def progress(done: int, total: int = total) -> None:
                if done % _STEP == 0 and sys.stderr.isatty():
                    print(f"\r{done} of {total} cases", end="\r", file=sys.stderr, flush=True)

            results.append(job.run(progress))
            print(format_table(results[-1], job.title), flush=True)
            print()
            if results[-1].stalled:
                print("a kernel hangs: nothing else was tested", flush=True)
                # Python's own end may wait for the GPU, as the driver's may.
                os._exit(1)
    for line in untested:
        print(line)
    kernels = [result for result in results if result.subject.backend == "triton"]
    if device.type == "cuda" and kernels and all(result.passed for result in kernels):
        record.store(record.collect_facts(device))
    return 0 if results and all(result.passed for result in results) else 1


def _describe_devices(count: int) -> str:
    """Name the devices that may be asked for where torch sees ``count`` GPUs."""
    if not count:
        return f"cpu: torch {torch.__version__} sees no GPU"
    return (
        f"cuda:0 or cpu: torch {torch.__version__} sees one GPU"
        if count == 1
        else f"cuda:0 to cuda:{count - 1}, or cpu"
    )
