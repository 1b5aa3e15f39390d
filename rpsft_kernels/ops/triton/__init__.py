"""The operations as grouped Triton kernels: one launch per phase over many weights of different shapes.

========== ================================== =================================================
project    ``T = (W - W0) V`` or ``W V``       read a row of the table per weight (``fields``),
drift      ``C = U^T T - B``, ``||C||^2``       walk a static schedule (``schedule``), compile one
pull       ``P = scale * U C``                 variant per layout and dtype (``variant``)
gradient   ``G (+)= P V^T``
========== ================================== =================================================

Triton is imported by ``kernels``, ``jit`` and ``compile`` alone, and only for what it has to compile or interpret:
planning does without, and so do kernels compiled ahead of time (``rpsft_kernels.ops.triton.aot.dispatch``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import toolchain
from .aot import dispatch as aot


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    # The interpreter needs the package alone, a GPU without kernels a C compiler too.
    missing = toolchain.jit_missing() if device.type == "cuda" else toolchain.triton_missing()
    if missing:
        if device.type != "cuda":
            return missing
        reason = aot.unavailable(device)
        if reason is not None:
            return f"{missing}, and {reason}"
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return "its kernels take bfloat16, float16 and float32"
    if device.type == "cuda":
        if _interpreted():
            return "TRITON_INTERPRET is set, and the interpreter cannot follow pointers into a GPU's memory; unset it"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need compute capability 8.0 or newer"
        return None
    if device.type == "cpu":
        return None if _interpreted() else "on the CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1)"
    return "its kernels run on CUDA and ROCm devices"


def _interpreted() -> bool:
    from .tile_table import interpreted

    return interpreted()


def arithmetic(device: torch.device) -> str:
    from .device import device_profile

    return device_profile(device).architecture


def project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    from .full_form import run_whole_forward
    from .project_drift import run_forward

    if not lefts:
        return run_whole_forward(weights, bases)
    return run_forward(weights, *_readable_pairs(lefts, rights), bases, blocks)


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
    from .full_form import run_whole_backward
    from .pull_back import run_backward

    if not lefts:
        run_whole_backward(grads, weights, bases, scales, accumulate)
    else:
        run_backward(grads, *_readable_pairs(lefts, rights), drifts, scales, accumulate)


def _readable_pairs(lefts: Sequence[Tensor], rights: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """U and V of each weight in one dtype that kernels come in, as anchors hold them: bfloat16, else float32."""
    if all(u.dtype == v.dtype in (torch.bfloat16, torch.float32) for u, v in zip(lefts, rights, strict=True)):
        return lefts, rights
    dtypes = [
        torch.bfloat16 if u.dtype == v.dtype == torch.bfloat16 else torch.float32
        for u, v in zip(lefts, rights, strict=True)
    ]
    return [u.to(d) for u, d in zip(lefts, dtypes, strict=True)], [v.to(d) for v, d in zip(rights, dtypes, strict=True)]
