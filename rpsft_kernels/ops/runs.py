"""What a prepared program offers, whichever backend runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from .operands import Operands


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

    def prepare_gradients(
        self, batch: int, members: Sequence[int], operands: Operands, dtype: torch.dtype, accumulate: bool = False
    ) -> None:
        """Find out now whether gradients of ``dtype`` that do not exist yet can be computed: those that a backward pass
        will make, or with ``accumulate`` those that a later call of :meth:`stage_pull_back` will give.
        """

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
