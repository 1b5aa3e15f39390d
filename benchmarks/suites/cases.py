"""The cases of the suites: real layers, whole models, scaling along one axis, and anchors, at three scales.

``smoke`` runs everything on toy shapes, ``small`` is for a laptop's CPU (minutes on two cores), ``large`` for a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from benchmarks.reporting.results import Suite
from benchmarks.suites import providers
from rpsft_kernels.tools.models import MODELS

Scale = Literal["smoke", "small", "large"]
Shape = tuple[int, int]
SCALES: tuple[Scale, ...] = ("smoke", "small", "large")
# Share of the free memory that a case may take.
_MEMORY_SHARE = 0.7
_TOY: list[Shape] = [(48, 64), (16, 64), (96, 64), (64, 96)]


@dataclass(frozen=True)
class BenchCase:
    """One set of weights, on which all its providers are measured in the same rounds.

    Attributes:
        name: unique within the suite.
        model: the model that has these shapes.
        axis, x: the quantity that the scaling suite varies, and its value.
        only: names of the providers that take part; empty for all.
        copies: number of layers, which alternate.
        rounds: number of rounds, in each of which every provider runs once.
        budget: seconds for a provider's turns; a slow one takes part in the first rounds only, at least one.
        patience: a provider whose step would take more seconds is not run.
        memory: whether the peak memory is measured, on a CPU in a process of its own for each provider.
        compiling: whether providers that need ``torch.compile`` take part.
    """

    suite: Suite
    name: str
    shapes: tuple[Shape, ...]
    rank: int
    dtype: torch.dtype
    model: str | None = None
    axis: str | None = None
    x: float | None = None
    only: tuple[str, ...] = ()
    copies: int = 2
    rounds: int = 7
    budget: float = 6.0
    patience: float = 4.0
    memory: bool = False
    compiling: bool = False

    @property
    def elements(self) -> int:
        return sum(m * n for m, n in self.shapes)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def takes(self, provider: str) -> bool:
        return not self.only or provider in self.only


def held_bytes(shapes: Sequence[Shape], rank: int, dtype: torch.dtype) -> int:
    """Estimate the bytes that a case holds for all providers together."""
    size = dtype.itemsize
    # W, its gradient and W0; W0 in bfloat16; operands and results of the products.
    dense = 3 * size + (0 if dtype == torch.bfloat16 else 4) + 2
    total = 0
    for m, n in shapes:
        k = min(rank, m, n)
        # U and V in float32, bfloat16 and float16; C and B in all dtypes.
        total += m * n * dense + (m + n) * k * 8 + k * k * 24
    return total


def available_bytes(device: torch.device) -> int:
    """Return the free memory of the device."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.M)
    except OSError:
        match = None
    # Elsewhere than on Linux, half of the memory counts as free.
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def model_shapes(model: str, layers: int) -> list[Shape]:
    """List all weights of a model that has ``layers`` of its layers."""
    shape = MODELS[model]
    whole = shape.weights()
    # The embedding comes first, an untied head last.
    return [whole[0], *shape.layer() * layers, *([] if shape.tied else [whole[-1]])]


def fitting_layers(model: str, rank: int, dtype: torch.dtype, available: int) -> int:
    """Find the most layers whose case fits into ``available`` bytes; 0 where not even one does."""
    fixed = held_bytes(model_shapes(model, 0), rank, dtype)
    each = held_bytes(MODELS[model].layer(), rank, dtype)
    return max(0, min(MODELS[model].layers, int((_MEMORY_SHARE * available - fixed) // each)))


def _layer(model: str, rank: int, dtype: torch.dtype, **options: object) -> BenchCase:
    name = f"{model} layer k={rank} {str(dtype).removeprefix('torch.')}"
    shapes = tuple(MODELS[model].layer())
    return BenchCase("layer", name, shapes, rank, dtype, model=model, **options)  # type: ignore[arg-type]


def _model(model: str, rank: int, dtype: torch.dtype, available: int, **options: object) -> list[BenchCase]:
    layers = fitting_layers(model, rank, dtype, available)
    if not layers:
        return []
    share = "whole" if layers == MODELS[model].layers else f"{layers} of {MODELS[model].layers} layers"
    name = f"{model} {share} k={rank} {str(dtype).removeprefix('torch.')}"
    shapes = tuple(model_shapes(model, layers))
    # One copy: a model is larger than any cache.
    return [BenchCase("model", name, shapes, rank, dtype, model=model, copies=1, **options)]  # type: ignore[arg-type]


def _scaling(axis: str, x: int, shapes: Sequence[Shape], rank: int, **options: object) -> BenchCase:
    size = f"{shapes[0][0]}x{shapes[0][1]}"
    name = f"{axis}={x}: {len(shapes)} x {size} k={rank} bfloat16"
    return BenchCase("scaling", name, tuple(shapes), rank, torch.bfloat16, axis=axis, x=float(x), **options)  # type: ignore[arg-type]


def _anchors(shape: Shape, rank: int, model: str | None = None, **options: object) -> BenchCase:
    name = f"{shape[0]}x{shape[1]} k={rank} bfloat16"
    return BenchCase("anchors", name, (shape,), rank, torch.bfloat16, model=model, copies=1, **options)  # type: ignore[arg-type]


def _best(device: torch.device) -> tuple[str, str]:
    """Name the best backend's providers in base form: accumulating, and by autograd."""
    usable = [provider for provider in providers.ours(device, torch.bfloat16) if not provider.why_not]
    backend = usable[0].name.partition(",")[0]
    return providers.ours_name(backend, "base"), providers.ours_name(backend, "base", autograd=True)


def select(suite: Suite, scale: Scale, device: torch.device) -> list[BenchCase]:
    """Select the cases of a suite; whole models as far as the device's free memory goes."""
    bf16, fp32 = torch.bfloat16, torch.float32
    # The providers that decide whether to adopt the package, without the variants of each.
    few = (*_best(device), providers.PLAIN, providers.GEMM, providers.BF16)
    if scale == "smoke":
        toy = {"rounds": 2, "budget": 1.0}
        return {
            "layer": [
                BenchCase("layer", f"toy layer k=16 {name}", tuple(_TOY), 16, dtype, **toy)  # type: ignore[arg-type]
                for name, dtype in (("bfloat16", bf16), ("float32", fp32))
            ],
            "model": [BenchCase("model", "toy model k=16 bfloat16", tuple(_TOY * 2), 16, bf16, copies=1, **toy)],  # type: ignore[arg-type]
            "scaling": [
                *(_scaling("elements", n * n, [(n, n)], 16, only=few, **toy) for n in (32, 64)),
                *(_scaling("rank", k, [(64, 96)], k, only=few, **toy) for k in (16, 32)),
                *(_scaling("weights", count, [(32, 48)] * count, 16, only=few, **toy) for count in (1, 4)),
            ],
            "anchors": [_anchors((48, 64), 16, **toy)],
        }[suite]
    available = available_bytes(device)
    if scale == "small":
        quick = {"rounds": 7, "budget": 3.0, "only": few}
        return {
            "layer": [
                _layer("smollm2-135m", 128, bf16, compiling=True),
                _layer("qwen2.5-0.5b", 128, bf16, memory=True),
                _layer("qwen2.5-0.5b", 384, bf16, memory=True),
                _layer("qwen2.5-0.5b", 384, fp32),
                _layer("llama-3.2-1b", 128, bf16, budget=3.0),
                _layer("llama-3.2-1b", 384, bf16, budget=6.0),
            ],
            "model": _model("smollm2-135m", 128, bf16, available, rounds=5, only=few),
            "scaling": [
                *(_scaling("elements", n * n, [(n, n)], 128, **quick) for n in (512, 1024, 2048)),
                *(_scaling("rank", k, [(2048, 2048)], k, **quick) for k in (64, 256, 1024)),
                *(_scaling("weights", count, [(576, 576)] * count, 64, **quick) for count in (1, 4, 16)),
            ],
            "anchors": [
                _anchors((576, 576), 128, "smollm2-135m", rounds=3),
                _anchors((896, 4864), 128, "qwen2.5-0.5b", rounds=3),
            ],
        }[suite]
    many = {"rounds": 20, "budget": 10.0, "patience": 60.0, "memory": True}
    quick = {"rounds": 20, "budget": 3.0, "patience": 60.0, "memory": True, "only": few}
    return {
        "layer": [
            _layer("llama-3.1-8b", 768, bf16, compiling=True, **many),
            _layer("qwen2.5-7b", 768, bf16, **many),
            _layer("qwen2.5-3b", 768, bf16, **many),
            _layer("llama-3.1-8b", 128, bf16, **many),
            _layer("llama-3.1-8b", 768, fp32, **many),
        ],
        "model": [
            case
            for model in ("llama-3.2-1b", "llama-3.1-8b")
            for case in _model(model, 768, bf16, available, **{**many, "rounds": 7, "only": (*few, providers.FP16)})
        ],
        "scaling": [
            *(_scaling("elements", n * n, [(n, n)], 768, **quick) for n in (1024, 2048, 4096, 8192, 16384)),
            *(_scaling("rank", k, [(4096, 8192)], k, **quick) for k in (64, 128, 256, 512, 768, 1024)),
            *(_scaling("weights", count, [(1024, 1024)] * count, 128, **quick) for count in (1, 4, 16, 64, 256)),
        ],
        "anchors": [
            _anchors((1024, 4096), 768, "llama-3.1-8b", rounds=2, budget=20.0),
            _anchors((4096, 4096), 768, "llama-3.1-8b", rounds=2, budget=20.0),
        ],
    }[suite]
