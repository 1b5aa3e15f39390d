"""Measures the ``torch`` backend, which serves GPUs and dtypes without kernels, beside the same formula in plain
``torch.mm`` code.

python -m benchmarks.suites.gpu_reference [--model llama-3.1-8b] [--rank 768] [--rounds 20] [--device auto|cpu|cuda]

For bfloat16 and float32 weights of one layer of the model, both add the gradient in turns; prints times, their ratio
round by round, and what the backend holds beside weights, anchors and gradients. Ends with status 1 if the gradient is
wrong, and on a GPU also if a ratio is over 1.5 or the temporaries over 256 MiB.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.suites.layer import Layer
from benchmarks.suites.machine import DEVICES, choose_device
from benchmarks.suites.measure import Clock
from benchmarks.suites.providers import PLAIN, Provider, Step, ours_name, providers
from rpsft_kernels.tools.models import MODELS

MAX_RATIO = 1.5
MAX_BYTES = 256 << 20
DTYPES = (torch.bfloat16, torch.float32)
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Figures:
    """Seconds are medians; ``extra_bytes`` is None on a CPU, where memory.py measures it."""

    dtype: torch.dtype
    ours: float
    plain: float
    ratio: float
    host: float | None
    error: float
    bound: float
    extra_bytes: int | None

    def line(self) -> str:
        held = "-" if self.extra_bytes is None else f"{self.extra_bytes / 2**20:.0f} MiB"
        host = "-" if self.host is None else f"{self.host * 1e3:.2f} ms"
        return (
            f"{str(self.dtype).removeprefix('torch.')}: backend torch {self.ours * 1e3:.3f} ms (host {host}), plain "
            f"{self.plain * 1e3:.3f} ms, ratio {self.ratio:.2f}; gradient error {self.error:.1e}; beside it {held}"
        )

    def faults(self) -> list[str]:
        """Describe every figure that is out of its bounds."""
        faults = []
        if not self.error <= self.bound:
            faults.append(f"a weight's gradient is off by {self.error:.1e}, expected at most {self.bound:.0e}")
        # Times are judged on a GPU alone: on a CPU float32 is the reference itself.
        if self.extra_bytes is not None:
            if self.ratio > MAX_RATIO:
                faults.append(f"{self.ratio:.2f} times as long as plain torch, expected at most {MAX_RATIO}")
            if self.extra_bytes > MAX_BYTES:
                faults.append(f"{self.extra_bytes} bytes of temporaries, expected at most {MAX_BYTES}")
        return faults


def measure(shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, rounds: int, clock: Clock) -> Figures:
    layer = Layer(shapes, rank, dtype, 0, clock.device)
    by_name = {provider.name: provider for provider in providers(clock.device, dtype, compiling=False)}
    ours = by_name[ours_name("torch", "base")]
    steps = [_warm_up(ours, layer, clock), _warm_up(by_name[PLAIN], layer, clock)]
    layer.clear_gradients()
    held = _extra_bytes(steps[0], clock.device)
    error = layer.worst_gradient_error()
    assert ours.bound is not None
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (turn % 2, 1 - turn % 2):
            clock.flush()
            seconds[which].append(clock.seconds(steps[which]))
    ratio = statistics.median(mine / theirs for mine, theirs in zip(*seconds, strict=True))
    return Figures(
        dtype,
        ours=statistics.median(seconds[0]),
        plain=statistics.median(seconds[1]),
        ratio=ratio,
        host=clock.host_seconds(steps[0]),
        error=error,
        bound=ours.bound,
        extra_bytes=held,
    )


def _warm_up(provider: Provider, layer: Layer, clock: Clock) -> Step:
    step = provider(layer)
    for _ in range(_WARM_UP_STEPS):
        step()
    clock.synchronize()
    return step


def _extra_bytes(step: Step, device: torch.device) -> int | None:
    """Run one step; return the most memory that it held beyond that held before, None on a CPU."""
    if device.type != "cuda":
        step()
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3.1-8b")
    parser.add_argument("--rank", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=DEVICES, default="auto")
    options = parser.parse_args(arguments)
    return run(MODELS[options.model].layer(), options.rank, options.rounds, choose_device(options.device))


def run(shapes: Sequence[tuple[int, int]], rank: int, rounds: int, device: torch.device) -> int:
    """Print the figures of both dtypes; return the exit status."""
    clock = Clock(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}: {len(shapes)} weights, rank {rank}")
    status = 0
    for dtype in DTYPES:
        figures = measure(shapes, rank, dtype, rounds, clock)
        print(figures.line())
        for fault in figures.faults():
            print(f"  WRONG: {fault}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
