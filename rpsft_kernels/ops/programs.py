"""Batches of weights prepared for a backend, to be run at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .dispatch import Backend
from .operands import Operands
from .torch_ops import make_ready, without_autocast


class Run(Protocol):
    """One call's use of a program: stage all operations, send, then queue them. Batches are known by their places."""

    def stage_projection(self, batch: int, operands: Operands, keep: bool) -> None:
        """Prepare the drifts and squares of a batch. Without ``keep`` the drifts are gone at the next projection."""

    def stage_pull_back(
        self,
        batch: int,
        members: Sequence[int],
        operands: Operands,
        grads: Sequence[Tensor],
        scales: Sequence[float] | Tensor,
        accumulate: bool,
        drifts: Sequence[Tensor] | None = None,
    ) -> Any:
        """Prepare gradients of some of a batch's matrices; returns what :meth:`pull_back_` takes.

        Args:
            members: places in the batch; ``operands`` and ``grads`` are theirs alone.
            scales: numbers, or (n,) on the device.
            drifts: C (k, k) of each; None: what the projection of the same batch leaves.
        """

    def prepare_new_gradients(self, batch: int, members: Sequence[int], operands: Operands, dtype: torch.dtype) -> None:
        """Find out now whether gradients of ``dtype`` that a backward pass will make can be computed."""

    def send(self) -> None:
        """Have everything that is staged where it is needed.

        Raises:
            NoKernel, ValueError: an operation cannot be computed here. Nothing has been computed.
        """

    def turn(self) -> AbstractContextManager[Any]:
        """Held while a batch is projected and pulled back, where its drifts are not kept."""

    def project(self, batch: int) -> list[Tensor]:
        """Compute a batch's drifts and squares; returns the drifts (k, k) where they are kept."""

    def squares_of(self, batch: int) -> Tensor:
        """(n,) squared norms of the drifts, or of W - W0 of full anchors; valid during this run."""

    def pull_back_(self, operation: Any, scales: Sequence[float] | Tensor = ()) -> None:
        """Compute what was staged; ``scales`` again where they lie on the device."""


class Program(Protocol):
    """Any number of threads and streams may run a program at a time."""

    def begin(self) -> Run:
        """What one call uses, on the device's current stream, and no other call before :meth:`end`."""

    def end(self, run: Any) -> None:
        """Give it back."""


@contextmanager
def running(program: Program) -> Iterator[Run]:
    """One run of a program."""
    run = program.begin()
    try:
        yield run
    finally:
        program.end(run)


def prepare_program(backend: str, device: torch.device, counts: Sequence[int]) -> Program:
    """A program for batches of so many matrices each.

    Raises:
        RuntimeError: the GPU's kernels have failed their self-test.
    """
    ready = make_ready(backend, device)
    if backend == "triton":
        from .triton.program import Program as TritonProgram

        return TritonProgram(device, counts)
    return _DirectProgram(ready, device)


class _DirectProgram:
    """A backend that has nothing to prepare."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self._backend, self._device = backend, device

    def begin(self) -> Run:
        return _DirectRun(self._backend, self._device)

    def end(self, run: Run) -> None:
        pass


class _Pull(NamedTuple):
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
    ) -> _Pull:
        return _Pull(batch, members, operands, grads, scales, accumulate, drifts)

    def prepare_new_gradients(self, batch: int, members: Sequence[int], operands: Operands, dtype: torch.dtype) -> None:
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

    def pull_back_(self, operation: _Pull, scales: Sequence[float] | Tensor = ()) -> None:
        pull = operation
        drifts = [self._drifts[pull.batch][i] for i in pull.members] if pull.drifts is None else pull.drifts
        numbers = pull.scales if isinstance(pull.scales, Tensor) else torch.tensor(pull.scales, dtype=drifts[0].dtype)
        with without_autocast(self._device):
            self._backend.pull_back_into(pull.grads, pull.operands, drifts, numbers, pull.accumulate)
