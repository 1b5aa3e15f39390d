"""The ``triton`` backend: the devices and dtypes that it serves, and the two operations on the grouped kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operands import Operands
from ..runs import open_run
from . import toolchain
from .aot import dispatch as aot


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    # The interpreter needs the package triton alone; to start kernels on a GPU, Triton also needs a C compiler.
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
        if _is_interpreted():
            return "TRITON_INTERPRET is set, and the interpreter cannot follow pointers into a GPU's memory; unset it"
        if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
            return "its kernels need compute capability 8.0 or newer"
        return None
    if device.type == "cpu":
        return None if _is_interpreted() else "on the CPU it runs only in Triton's interpreter (TRITON_INTERPRET=1)"
    return "its kernels run on CUDA and ROCm devices"


def cannot_write(dtype: torch.dtype) -> str | None:
    from .layout import TYPE_NAMES

    return None if dtype in TYPE_NAMES else "its kernels write bfloat16, float16 and float32 only"


def _is_interpreted() -> bool:
    from .tile_table import is_interpreted

    return is_interpreted()


# By tile table: how often a change of its kernels has changed the bits of C, so that blocks of before do not fit.
_REVISIONS = {"sm_90": 2}


def arithmetic(device: torch.device) -> str:
    from .device import device_profile

    table = device_profile(device).architecture
    return f"{table}-{_REVISIONS[table]}" if table in _REVISIONS else table


def project_drift(operands: Operands) -> tuple[list[Tensor], Tensor]:
    from .program import TritonProgram

    with open_run(TritonProgram(operands.weights[0].device, [len(operands.weights)])) as run:
        run.stage_projection(0, operands, keep=True)
        run.send()
        return run.project(0), run.squares_of(0)


def pull_back_into(
    grads: Sequence[Tensor], operands: Operands, drifts: Sequence[Tensor], scales: Tensor, accumulate: bool
) -> None:
    from .program import TritonProgram

    factors = scales.detach().tolist() if scales.device.type == "cpu" else scales
    with open_run(TritonProgram(grads[0].device, [len(grads)])) as run:
        staged = run.stage_pull_back(0, range(len(grads)), operands, grads, factors, accumulate, drifts)
        run.send()
        run.pull_back_(staged, factors)
