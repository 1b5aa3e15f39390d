"""The compiled CPU engine (``csrc``): tensors in, addresses, shapes and strides out.

Each block of a weight is read once: ``W - W0`` is formed in float32 and multiplied in place, as pairs of bfloat16 where
the anchor's form and the processor allow, else in float32. Sums are float32. Results have the same bits for every
number of threads; they depend on the instruction set.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str]:
    """The compiled module, or None and the reason why there is none."""
    try:
        return importlib.import_module("rpsft_kernels._native"), ""
    except ImportError as error:
        if error.name == "rpsft_kernels._native":
            built = Path(__file__).parent.parent / "_native_build.txt"
            why = built.read_text(encoding="utf-8").strip() if built.is_file() else "it was not built"
            return None, f"this installation carries no compiled CPU engine: {why}"
        return None, f"the compiled CPU engine does not load: {error}"


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that the engine can use on this processor, best first; empty where it is not built."""
    module, _ = _load()
    return () if module is None else tuple(module.instruction_sets())


def missing() -> str:
    """Why there is no engine; "" where there is one."""
    return _load()[1]


def instruction_set() -> str:
    """The one in use: RPSFT_ISA, else the best.

    Raises:
        ValueError: RPSFT_ISA names one that this processor or build lacks, or there is no engine.
    """
    module, reason = _load()
    if module is None:
        raise ValueError(f"backend 'native': {reason}")
    usable = instruction_sets()
    wanted = os.environ.get("RPSFT_ISA", "")
    if wanted and wanted not in usable:
        raise ValueError(
            f"environment variable RPSFT_ISA: got {wanted!r}, expected one of {', '.join(map(repr, usable))} on this "
            "processor; unset it for the best"
        )
    return wanted or usable[0]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it computes on the CPU only"
    module, reason = _load()
    if module is None:
        return reason
    if dtype not in _DTYPES:
        return "it computes in bfloat16, float16 and float32 only"
    return None


def arithmetic(device: torch.device) -> str:
    return instruction_set()


def _matrix(tensor: Tensor | None) -> Any:
    module, _ = _load()
    if tensor is None:
        return module.Matrix()
    dtype = getattr(module.Dtype, _DTYPES[tensor.dtype])
    return module.Matrix(tensor.data_ptr(), dtype, *tensor.shape, *tensor.stride())


def _basis(basis: Tensor, dtype: torch.dtype) -> Tensor:
    # Rows that lie side by side are what the engine reads fast; anchors hold them so.
    basis = basis.to(dtype)
    return basis if basis.stride(1) == 1 else basis.contiguous()


def _bases(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """U and V of each weight in one dtype that the engine reads."""
    pairs = []
    for left, right in zip(lefts, rights, strict=True):
        dtype = torch.bfloat16 if left.dtype == right.dtype == torch.bfloat16 else torch.float32
        pairs.append((_basis(left, dtype), _basis(right, dtype)))
    return pairs


def _readable(base: Tensor, weight: Tensor) -> Tensor:
    return base if base.dtype in _DTYPES else base.to(weight.dtype)


def project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    chosen = instruction_set()
    module, _ = _load()
    squares = weights[0].new_empty((len(weights),), dtype=torch.float32)
    pairs = _bases(lefts, rights)
    # Held until the engine returns: it sees only their addresses.
    held = [block.float().contiguous() for block in blocks]
    bases = [_readable(base, weight) for base, weight in zip(bases, weights, strict=bool(bases))]
    drifts, shards = [], []
    for i, weight in enumerate(weights):
        left, right = pairs[i] if pairs else (None, None)
        rank = 0 if left is None else left.shape[1]
        drift = weight.new_empty((rank, rank), dtype=torch.float32)
        drifts.append(drift)
        shards.append(
            module.Projection(
                _matrix(weight),
                _matrix(bases[i] if bases else None),
                _matrix(left),
                _matrix(right),
                held[i].data_ptr() if held else 0,
                drift.data_ptr(),
                squares.data_ptr() + i * squares.element_size(),
            )
        )
    module.project_drift(shards, chosen, torch.get_num_threads())
    return drifts, squares


def pull_back_into(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
) -> None:
    chosen = instruction_set()
    module, _ = _load()
    for grad in grads:
        if grad.dtype not in _DTYPES:
            raise ValueError(
                f"backend 'native': got a gradient in {str(grad.dtype).removeprefix('torch.')}, expected bfloat16, "
                "float16 or float32; use_backend('torch') takes any"
            )
    pairs = _bases(lefts, rights)
    held = [drift.float().contiguous() for drift in drifts]
    bases = [_readable(base, weight) for base, weight in zip(bases, weights, strict=True)]
    shards = []
    for i, (grad, scale) in enumerate(zip(grads, scales.tolist(), strict=True)):
        left, right = pairs[i] if pairs else (None, None)
        weight, base = (None, None) if pairs else (weights[i], bases[i])
        drift = held[i].data_ptr() if pairs else 0
        shards.append(
            module.Pullback(_matrix(grad), _matrix(left), _matrix(right), _matrix(weight), _matrix(base), drift, scale)
        )
    module.pull_back(shards, accumulate, chosen, torch.get_num_threads())
