"""Programs: batches of weights prepared for a backend, to be run at every step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dispatch import Backend
from .operands import Operands
from .runs import FactorProgram, Program, Run
from .torch_ops import make_ready, without_autocast


def prepare_program(backend: str, device: torch.device, counts: Sequence[int]) -> Program:
    """Prepare a program for batches of so many matrices each.

    Raises:
        RuntimeError: the GPU's kernels have failed their self-test.
    """
    ready = make_ready(backend, device)
    if backend == "triton":
        from .triton.program import TritonProgram

        return TritonProgram(device, counts)
    return _DirectProgram(ready, device)


def prepare_factors(device: torch.device, counts: Sequence[int]) -> FactorProgram:
    """Prepare the kernels (backend ``triton``) for batches of so many low-rank factors each.

    Raises:
        RuntimeError: the GPU's kernels have failed their self-test.
    """
    make_ready("triton", device)
    from .triton.program import TritonProgram

    return TritonProgram(device, counts)


class _DirectProgram:
    """The program of a backend that has nothing to prepare."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend, self._device = backend, device

    def begin(self) -> Run:
        return _DirectRun(self._backend, self._device)

    def end(self, run: Run) -> None:
        pass


class _StagedPullBack(NamedTuple):
    batch: int
    members: Sequence[int]
    operands: Operands
    grads: Sequence[Tensor]
    scales: Sequence[float] | Tensor
    accumulate: bool
    drifts: Sequence[Tensor] | None


class _DirectRun:
    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend, self._device = backend, device
        self._staged: dict[int, tuple[Operands, bool]] = {}
        self._drifts: dict[int, list[Tensor]] = {}
        self._squares: dict[int, Tensor] = {}
        self._unkept: int | None = None

    def stage_projection(self, batch: int, operands: Operands, keep: bool) -> None:
        self._staged[batch] = operands, keep

    def stage_pull_back(
        self,
        batch: int,
        members: Sequence[int],
        operands: Operands,
        grads: Sequence[Tensor],
        scales: Sequence[float] | Tensor,
        accumulate: bool,
        drifts: Sequence[Tensor] | None = None,
    ) -> _StagedPullBack:
        return _StagedPullBack(
            batch=batch,
            members=members,
            operands=operands,
            grads=grads,
            scales=scales,
            accumulate=accumulate,
            drifts=drifts,
        )

    def prepare_gradients(
        self, batch: int, members: Sequence[int], operands: Operands, dtype: torch.dtype, accumulate: bool = False
    ) -> None:
        pass

    def send(self) -> None:
        pass

    def turn(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def project(self, batch: int) -> list[Tensor]:
        if self._unkept is not None:
            self._drifts.pop(self._unkept, None)
        operands, keep = self._staged[batch]
        self._unkept = None if keep else batch
        with without_autocast(self._device):
            drifts, self._squares[batch] = self._backend.project_drift(operands)
        self._drifts[batch] = drifts
        return drifts

    def squares_of(self, batch: int) -> Tensor:
        return self._squares[batch]

    def pull_back_(self, operation: _StagedPullBack, scales: Sequence[float] | Tensor = ()) -> None:
        drifts = operation.drifts
        if drifts is None:
            drifts = [self._drifts[operation.batch][i] for i in operation.members]
        factors = operation.scales
        if not isinstance(factors, Tensor):
            factors = torch.tensor(factors, dtype=drifts[0].dtype, device="cpu")
        with without_autocast(self._device):
            self._backend.pull_back_into(operation.grads, operation.operands, drifts, factors, operation.accumulate)
