"""The ``native`` backend: hands tensors to the compiled CPU engine (``csrc``) as addresses, shapes and strides.

Each block of a weight is read once: ``W - W0`` is formed in float32 and multiplied in place, as pairs of bfloat16 where
the anchor's form and the processor allow, else in float32. Sums are float32. Results have the same bits for every
number of threads; they depend on the instruction set.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .native_check import find_disagreement
from .operands import Operands, cast_base

# Instruction sets that no processor which has them has run yet.
_NEVER_RUN = ("amx_bf16",)
_DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
# The engine subtracts any two of its dtypes.
_READABLE = frozenset(product(_DTYPES, _DTYPES))


@lru_cache(maxsize=1)
def _load() -> tuple[Any, str | None]:
    """Return the compiled module, or None and the reason why there is none."""
    try:
        return importlib.import_module("rpsft_kernels._native"), None
    except ImportError as error:
        if error.name == "rpsft_kernels._native":
            why = _why_missing(Path(__file__).parents[1])
            return None, f"this installation carries no compiled CPU engine: {why}"
        return None, f"the compiled CPU engine does not load: {error}"


def _why_missing(package: Path) -> str:
    """Say why the package in this folder has no compiled module."""
    built = package / "_native_build.txt"
    if built.is_file():
        return built.read_text(encoding="utf-8").strip()
    if package.with_name("setup.py").is_file():
        return (
            f"it was not built; these are the sources in {package.parent}, which Python takes before what pip "
            "installed where it is started among them: start it in another folder, or pip install -e ."
        )
    return "it was not built"


@lru_cache(maxsize=1)
def instruction_sets() -> tuple[str, ...]:
    """List the instruction sets that the engine can use on this processor, best first; none where it is not built."""
    module, _ = _load()
    return () if module is None else tuple(module.instruction_sets())


def missing_instruction_sets() -> dict[str, str]:
    """Return the other instruction sets, each with the reason why the engine cannot use it here."""
    module, _ = _load()
    return {} if module is None else dict(module.missing_instruction_sets())


def missing() -> str | None:
    """Return the reason why there is no engine, or None where there is one."""
    return _load()[1]


def instruction_set() -> str:
    """Return the instruction set in use: RPSFT_ISA, else the best.

    Raises:
        ValueError: RPSFT_ISA names one that this processor or build lacks, or there is no engine.
    """
    module, reason = _load()
    if module is None:
        raise ValueError(f"backend 'native': {reason}")
    usable = instruction_sets()
    wanted = os.environ.get("RPSFT_ISA", "")
    if wanted and wanted not in usable:
        reason = missing_instruction_sets().get(wanted)
        raise ValueError(
            f"environment variable RPSFT_ISA: got {wanted!r}, expected one of {', '.join(map(repr, usable))} on this "
            f"processor; {f'{wanted} cannot run here: {reason}; ' if reason else ''}unset it for the best"
        )
    return wanted or _best_that_agrees()


@lru_cache(maxsize=1)
def _best_that_agrees() -> str:
    """Return the best instruction set; one that its authors could not run only if it agrees with the next."""
    module, _ = _load()
    best, *others = instruction_sets()
    if best not in _NEVER_RUN or not others:
        return best
    reason = find_disagreement(module, best, others[0])
    if reason is None:
        return best
    warnings.warn(
        f"backend 'native': {best} computes wrong numbers on this processor ({reason}, compared with {others[0]}), and "
        f"{others[0]} is used. Please report it with the output of 'python -m rpsft_kernels env'",
        UserWarning,
        stacklevel=2,
    )
    return others[0]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cpu":
        return "it computes on the CPU only"
    module, reason = _load()
    if module is None:
        return reason
    if dtype not in _DTYPES:
        return "it computes in bfloat16, float16 and float32 only"
    return None


def cannot_write(dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else "it writes bfloat16, float16 and float32 only"


def arithmetic(device: torch.device) -> str:
    return instruction_set()


@lru_cache(maxsize=1)
def _matrix_factory() -> tuple[Callable[..., Any], dict[torch.dtype, Any]]:
    """Return the engine's ``Matrix`` and its name of each dtype, looked up once: a call describes a dozen matrices."""
    module, _ = _load()
    return module.Matrix, {dtype: getattr(module.Dtype, name) for dtype, name in _DTYPES.items()}


def _matrix(tensor: Tensor | None) -> Any:
    matrix, dtypes = _matrix_factory()
    if tensor is None:
        return matrix()
    return matrix(tensor.data_ptr(), dtypes[tensor.dtype], *tensor.shape, *tensor.stride())


def _contiguous_rows(basis: Tensor) -> Tensor:
    # The engine reads rows fast only where their elements are neighbours, as they are in anchors.
    return basis if basis.stride(1) == 1 else basis.contiguous()


def _cast(operands: Operands) -> Operands:
    """Cast operands to dtypes and layouts that the engine reads."""
    operands = operands.cast_subspaces()
    pretrained = operands.pretrained and [
        cast_base(weight, base, _READABLE) for weight, base in zip(operands.weights, operands.pretrained, strict=True)
    ]
    return operands._replace(
        lefts=list(map(_contiguous_rows, operands.lefts)),
        rights=list(map(_contiguous_rows, operands.rights)),
        pretrained=pretrained,
    )


def project_drift(operands: Operands) -> tuple[list[Tensor], Tensor]:
    chosen = instruction_set()
    module, _ = _load()
    # The casts must live until the engine returns, which sees only their addresses.
    operands = _cast(operands)
    weights, lefts, rights, pretrained = operands[:4]
    blocks = [block.float().contiguous() for block in operands.blocks]
    squares = weights[0].new_empty((len(weights),), dtype=torch.float32)
    drifts, items = [], []
    for i, weight in enumerate(weights):
        left, right = (lefts[i], rights[i]) if lefts else (None, None)
        rank = 0 if left is None else left.shape[1]
        drift = weight.new_empty((rank, rank), dtype=torch.float32)
        drifts.append(drift)
        items.append(
            module.Projection(
                weight=_matrix(weight),
                base=_matrix(pretrained[i] if pretrained else None),
                left=_matrix(left),
                right=_matrix(right),
                block=blocks[i].data_ptr() if blocks else 0,
                drift=drift.data_ptr(),
                square=squares.data_ptr() + i * squares.element_size(),
            )
        )
    module.project_drift(items, chosen, torch.get_num_threads())
    return drifts, squares


def pull_back_into(
    grads: Sequence[Tensor], operands: Operands, drifts: Sequence[Tensor], scales: Tensor, accumulate: bool
) -> None:
    chosen = instruction_set()
    module, _ = _load()
    for grad in grads:
        if grad.dtype not in _DTYPES:
            raise ValueError(
                f"backend 'native': got a gradient in {str(grad.dtype).removeprefix('torch.')}, expected bfloat16, "
                "float16 or float32; use_backend('torch') takes any"
            )
    operands = _cast(operands.for_pull_back())
    drifts = [drift.float().contiguous() for drift in drifts]
    items = []
    for i, (grad, scale) in enumerate(zip(grads, scales.tolist(), strict=True)):
        left = right = weight = base = None
        drift = 0
        if operands.full:
            weight, base = operands.weights[i], operands.pretrained[i]
        else:
            left, right, drift = operands.lefts[i], operands.rights[i], drifts[i].data_ptr()
        items.append(
            module.Pullback(
                grad=_matrix(grad),
                left=_matrix(left),
                right=_matrix(right),
                weight=_matrix(weight),
                base=_matrix(base),
                drift=drift,
                scale=scale,
            )
        )
    module.pull_back(items, accumulate, chosen, torch.get_num_threads())
