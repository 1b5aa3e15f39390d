"""Measures the host's time for a step where a GPU does the work: both calls without the launches themselves.

TRITON_INTERPRET=1 python -m benchmarks.suites.host_time [--model llama-3.1-8b] [--rank 8] [--scale 64] [--rounds 50]

The model has the modules and weights of the one that is named, its sizes divided by ``--scale`` so that it fits
anywhere: the host's work depends on the number of weights, not on their size. Everything runs but the launch of a
prepared kernel: weights, gradients and anchors are compared, and changes are written into the table. It runs on the
CPU, where a step has buckets as on a GPU, no streams to ask for, and copies within the host's memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

os.environ.setdefault("TRITON_INTERPRET", "1")

import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from rpsft_kernels import ops
from rpsft_kernels.ops import buckets
from rpsft_kernels.ops.triton import launch
from rpsft_kernels.tools.models import MODELS, ModelShape

_DTYPE = torch.bfloat16


class Layer(nn.Module):
    def __init__(self, shapes: Sequence[tuple[int, int]], hidden: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({n: _linear(s) for n, s in zip("qkvo", shapes[:4], strict=True)})
        self.mlp = nn.ModuleDict({n: _linear(s) for n, s in zip(("gate", "up", "down"), shapes[4:], strict=True)})
        self.activation = nn.SiLU()
        self.norms = nn.ModuleList(nn.RMSNorm(hidden, dtype=_DTYPE) for _ in range(2))


class Model(nn.Module):
    """The weights of a Llama-like model below as many modules as such a model has."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.hidden, dtype=_DTYPE)
        self.layers = nn.ModuleList(Layer(shape.layer(), shape.hidden) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, dtype=_DTYPE)
        if not shape.tied:
            self.head = _linear((shape.vocabulary, shape.hidden))


def _linear(shape: tuple[int, int]) -> nn.Linear:
    return nn.Linear(shape[1], shape[0], bias=False, dtype=_DTYPE)


def _scale_down(shape: ModelShape, scale: int) -> ModelShape:
    sizes = shape.hidden, shape.intermediate, shape.key_value, shape.vocabulary
    return ModelShape(shape.layers, *(-(-size // scale) for size in sizes), tied=shape.tied)


def _anchor(weight: Tensor, rank: int) -> rk.Anchor:
    rank = min(rank, *weight.shape)
    left, right = (torch.randn(size, rank).to(_DTYPE) for size in weight.shape)
    base = weight.detach().clone()
    shape = (weight.shape[0], weight.shape[1])
    return rk.Anchor(left=left, right=right, base=base, shape=shape, weight_dtype=_DTYPE, rank=rank, energy=0.5)


@contextmanager
def _no_launches() -> Iterator[list[int]]:
    """Have kernels prepared and counted, not started, in the buckets of a GPU."""
    count = [0]

    def find_start(*_: object) -> Callable[[], None]:
        def start() -> None:
            count[0] += 1

        return start

    before = launch.find_start, buckets.CPU_LIMITS
    launch.find_start, buckets.CPU_LIMITS = find_start, ops.BucketLimits()
    try:
        yield count
    finally:
        launch.find_start, buckets.CPU_LIMITS = before


@dataclass(frozen=True)
class Case:
    """A step that is timed, and ``before``, which runs before each step and is not timed."""

    name: str
    before: Callable[[], None]
    step: Callable[[], object]


def cases(model: Model, anchors: rk.Anchors) -> list[Case]:
    parameters = list(model.parameters())
    held: list[Tensor | None] = []

    def nothing() -> None:
        pass

    def reallocate() -> None:
        # The old gradients are held until the new ones exist: else these could get the same addresses.
        held[:] = [parameter.grad for parameter in parameters]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)

    def clear() -> None:
        for parameter in parameters:
            parameter.grad = None

    def accumulate() -> object:
        return rk.accumulate_rotation_grad_(model, anchors, 0.1)

    def penalty() -> object:
        return rk.rotation_penalty(model, anchors).backward()

    return [
        Case("accumulate_rotation_grad_, the same gradients", nothing, accumulate),
        Case("accumulate_rotation_grad_, gradients at other addresses", reallocate, accumulate),
        Case("accumulate_rotation_grad_, no gradients yet", clear, accumulate),
        Case("rotation_penalty and its backward pass, the same gradients", nothing, penalty),
        Case("rotation_penalty and its backward pass, no gradients yet", clear, penalty),
    ]


def measure(case: Case, rounds: int, count: list[int]) -> str:
    case.before()
    case.step()
    times = []
    for _ in range(rounds):
        case.before()
        count[0] = 0
        begin = time.perf_counter()
        case.step()
        times.append(time.perf_counter() - begin)
    median, least = statistics.median(times) * 1e3, min(times) * 1e3
    return f"{case.name}: {median:.2f} ms (least {least:.2f}), {count[0]} launches"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-3.1-8b")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--scale", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model = Model(_scale_down(MODELS[options.model], options.scale))
    named = [(name, weight) for name, weight in model.named_parameters() if weight.ndim == 2]
    anchors = rk.Anchors({name: _anchor(weight, options.rank) for name, weight in named})
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    modules = sum(1 for _ in model.modules())
    load = os.getloadavg()[0]
    print(
        f"{options.model}: {len(anchors)} weights below {modules} modules, torch {torch.__version__}, load {load:.1f}"
    )
    with _no_launches() as count, rk.use_backend("triton"):
        for case in cases(model, anchors):
            print(measure(case, options.rounds, count), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
