"""The protocols of prepared programs and of their runs, whichever backend computes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .operands import Operands


class Run(Protocol):
    """One call's use of a program: stage all operations, send, then queue them. A batch is known by its place."""

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
        """Prepare gradients of some of a batch's matrices; returns the operation that :meth:`pull_back_` takes.

        Args:
            members: places in the batch; ``operands`` and ``grads`` are theirs alone.
            scales: numbers, or (n,) on the device.
            drifts: C (k, k) of each; None takes those that the projection of the same batch leaves.
        """

    def prepare_gradients(
        self, batch: int, members: Sequence[int], operands: Operands, dtype: torch.dtype, accumulate: bool = False
    ) -> None:
        """Check that gradients of ``dtype`` that do not exist yet can be computed: those that a backward pass will
        make, or with ``accumulate`` those that a later call of :meth:`stage_pull_back` will name.
        """

    def send(self) -> None:
        """Bring everything that is staged to where it is needed.

        Raises:
            NoKernel, ValueError: an operation cannot be computed here. Nothing has been computed.
        """

    def turn(self) -> AbstractContextManager[Any]:
        """Return a context to hold while a batch is projected and pulled back, where its drifts are not kept."""

    def project(self, batch: int) -> list[Tensor]:
        """Compute a batch's drifts and squares; returns the drifts (k, k) where they are kept."""

    def squares_of(self, batch: int) -> Tensor:
        """Return the (n,) squared norms of the drifts, or of W - W0 of full anchors; valid during this run."""

    def pull_back_(self, operation: Any, scales: Sequence[float] | Tensor = ()) -> None:
        """Compute a staged operation; ``scales`` are given again where they lie on the device."""


class Program(Protocol):
    """Batches prepared for one backend. Any number of threads and streams may run a program at a time."""

    def begin(self) -> Run:
        """Return the run of one call, on the device's current stream; no other call has it before :meth:`end`."""

    def end(self, run: Any) -> None:
        """Give a run back."""


class FactorRun(Protocol):
    """One call's use of a program for products of low-rank factors with bases. A batch has one r and one k."""

    def stage_factors(self, batch: int, factors: Sequence[Tensor], bases: Sequence[Tensor]) -> Any:
        """Prepare ``T = F V`` of factors (r, n) and bases (n, k)."""

    def project_factors(self, operation: Any) -> Tensor:
        """Compute T (count, r, k) in float32."""

    def stage_factor_gradients(self, batch: int, grads: Sequence[Tensor], bases: Sequence[Tensor]) -> Any:
        """Prepare ``G += X V^T`` of gradients (r, n) and bases (n, k)."""

    def add_factors_(self, operation: Any, coefficients: Tensor) -> None:
        """Add to the gradients; X is (count, r, k) in float32."""

    def send(self) -> None:
        """As :meth:`Run.send`."""


class FactorProgram(Protocol):
    """Batches of factors prepared for the kernels."""

    def begin(self) -> FactorRun:
        """As :meth:`Program.begin`."""

    def end(self, run: Any) -> None:
        """As :meth:`Program.end`."""


@contextmanager
def open_run(program: Program) -> Iterator[Run]:
    """Begin a run of a program, and give it back at the end of the ``with`` block."""
    run = program.begin()
    try:
        yield run
    finally:
        program.end(run)
