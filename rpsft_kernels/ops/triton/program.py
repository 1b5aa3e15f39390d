"""Many batches of weights on one device, prepared: their operations, one table for all of them, and scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor

from ..operands import Operands
from . import device as devices
from .aot import dispatch as aot
from .factors import FactorGradients, FactorImages
from .full_form import FullProjection, FullPullBack
from .layout import Facts, addresses_of, to_aligned_float32
from .operation import Operation, PullBackOperation, facts_of
from .project_drift import Projection
from .pull_back import PullBack
from .scratch import Scratch, scratch_of
from .table import Rows, Table
from .upload import is_capturing, reserve_for_captures

# More operations than a step can need mean that the requests keep changing; all operations are dropped then.
_MOST_OPERATIONS = 4096
# Runs kept for each stream; concurrent calls have one each.
_MOST_RUNS = 2
_MOST_STREAMS = 4
AnyOperation = Operation[Any, Any]
AnyPullBack = PullBackOperation[Any, Any]


class TritonProgram:
    """The batches of a plan, by their numbers of matrices. Any number of threads and streams may run it at a time."""

    def __init__(self, device: torch.device, counts: Sequence[int]) -> None:
        self._device, self._counts = device, list(counts)
        self._free: dict[int, list[TritonRun]] = {}

    def begin(self) -> TritonRun:
        """A run on the device's current stream, which no other call uses before :meth:`end`."""
        device = self._device
        circumstances = _circumstances(device)
        if is_capturing(device):
            # The graph has a run of its own: nothing that the program keeps may be written at a replay.
            return TritonRun(device, self._counts, Scratch(device), circumstances, None)
        stream = _stream(device)
        try:
            # Another thread may take the last run at the same time.
            run = self._free[stream].pop()
        except (KeyError, IndexError):
            run = None
        if run is None or run.circumstances != circumstances:
            run = TritonRun(device, self._counts, scratch_of(device, stream), circumstances, stream)
        return run

    def end(self, run: TritonRun) -> None:
        """Take a run back, for a later call on its stream."""
        run.end()
        if run.stream is None:
            return
        if self._device.type == "cuda":
            # This call has done its work even if there is no memory for captures; a capture reports that itself.
            with suppress(RuntimeError):
                reserve_for_captures()
        if run.stream not in self._free and len(self._free) >= _MOST_STREAMS:
            self._free.clear()
        free = self._free.setdefault(run.stream, [])
        if len(free) < _MOST_RUNS:
            free.append(run)


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _circumstances(device: torch.device) -> tuple[Any, ...]:
    """Everything but the operands that decides which launches a call makes."""
    return devices.device_profile(device), aot.mode() if device.type == "cuda" else ""


class TritonRun:
    """One call's use of a program. Stage all operations, send, then queue them.

    Attributes:
        squares: float32, the squares of every batch's matrices, behind each other; valid until the next run.
        circumstances: the profile and mode that its launches were planned under.
        stream: the handle of its stream; None for one that a captured graph owns.
    """

    def __init__(
        self,
        device: torch.device,
        counts: Sequence[int],
        scratch: Scratch,
        circumstances: tuple[Any, ...],
        stream: int | None,
    ) -> None:
        self.circumstances, self.stream = circumstances, stream
        self.operations: dict[Any, AnyOperation] = {}
        self._device, self._profile, self._scratch = device, circumstances[0], scratch
        self._offsets = [0]
        for count in counts:
            self._offsets.append(self._offsets[-1] + count)
        # Later calls may be outside of inference mode.
        with torch.inference_mode(False):
            self.squares = torch.empty(self._offsets[-1], dtype=torch.float32, device=device)
        self._scales: Tensor | None = None
        # A gradient may be written and added to in one call: three rows for most matrices.
        self._tables: list[Table] = [Table(device, 3 * self._offsets[-1])]
        self._staged: list[AnyOperation] = []
        self._drifts: dict[int, list[Tensor]] = {}
        self._held: list[Any] = []

    def end(self) -> None:
        """Let go of the call's tensors."""
        for operation in self._staged:
            operation.release()
        self._staged.clear()
        self._drifts.clear()
        self._held.clear()
        if len(self.operations) > _MOST_OPERATIONS:
            self.operations.clear()
            self._tables = [Table(self._device, 3 * self._offsets[-1])]

    def _operation(self, key: Any, count: int, make: Callable[[Rows], AnyOperation]) -> Any:
        operation = self.operations.get(key)
        if operation is None:
            if not self._tables[-1].has_room(count):
                self._tables.append(Table(self._device, max(count, 3 * self._offsets[-1])))
            operation = self.operations[key] = make(self._tables[-1].take(count))
        return operation

    def stage_projection(self, batch: int, operands: Operands, keep: bool) -> None:
        """Prepare the drifts and squares of a batch.

        ``keep``: the drifts get memory of their own; else they are lost when the next batch is projected.
        """
        kind = FullProjection if operands.full else Projection
        operation = self._operation(
            ("project", batch),
            len(operands.weights),
            lambda rows: kind(rows, self._device, self._profile, self.squares, self._offsets[batch]),
        )
        addresses = None
        if operands.full:
            self._drifts[batch] = [operands.weights[0].new_empty((0, 0), dtype=torch.float32)] * len(operands.weights)
        elif keep:
            self._drifts[batch] = drifts = new_drifts([left.shape[1] for left in operands.lefts], self._device)
            addresses = addresses_of(drifts)
        operation.stage(operands, addresses)
        self._staged.append(operation)

    def stage_pull_back(
        self,
        batch: int,
        members: Sequence[int],
        operands: Operands,
        grads: Sequence[Tensor],
        scales: Sequence[float] | Tensor,
        accumulate: bool,
        drifts: Sequence[Tensor] | None = None,
    ) -> AnyOperation:
        """Prepare gradients of some of a batch's matrices.

        Args:
            members: their places in the batch.
            operands: theirs alone.
            scales: numbers, or (n,) on the device.
            drifts: C (k, k) of each; None: what the batch's projection leaves in the scratch memory.
        """
        operation = self._pull_back(batch, members, operands, isinstance(scales, Tensor), accumulate)
        drift_places: Any = None
        if not operands.full:
            if drifts is None:
                drift_places = self.operations["project", batch], list(members)
            else:
                aligned = [to_aligned_float32(drift) for drift in drifts]
                self._held.append(aligned)
                drift_places = addresses_of(aligned)
        numbers = None if isinstance(scales, Tensor) else scales
        operation.stage(operands, facts_of(grads), addresses_of(grads), drift_places, numbers)
        self._staged.append(operation)
        return operation

    def prepare_gradients(
        self, batch: int, members: Sequence[int], operands: Operands, dtype: torch.dtype, accumulate: bool = False
    ) -> None:
        """Find out now whether gradients of ``dtype`` that do not exist yet can be computed: those that a backward pass
        will make, or with ``accumulate`` contiguous ones that a later call of :meth:`stage_pull_back` will give.

        Raises (when sent):
            NoKernel, ValueError: a kernel is missing, or must not run here.
        """
        operation = self._pull_back(batch, members, operands, not accumulate, accumulate)
        if operands.full:
            shapes = [(weight.shape[0], weight.shape[1]) for weight in operands.weights]
        else:
            shapes = [(u.shape[0], v.shape[0]) for u, v in zip(operands.lefts, operands.rights, strict=True)]
        facts: list[Facts] = [((m, n), (n, 1), dtype, 0) for m, n in shapes]
        if operation.expects(operands, facts):
            return
        nothing = [0] * len(shapes)
        operation.stage(operands, facts, nothing, nothing, None)
        self._staged.append(operation)

    def _pull_back(
        self, batch: int, members: Sequence[int], operands: Operands, scales_on_device: bool, accumulate: bool
    ) -> AnyPullBack:
        kind = FullPullBack if operands.full else PullBack
        memory = self._device_scales() if scales_on_device else None
        operation: AnyPullBack = self._operation(
            ("pull", batch, tuple(members), accumulate, scales_on_device),
            len(members),
            lambda rows: kind(rows, self._device, self._profile, accumulate, memory),
        )
        return operation

    def stage_factors(self, batch: int, factors: Sequence[Tensor], bases: Sequence[Tensor]) -> FactorImages:
        """Prepare ``T = F V`` of a batch of factors (r, n) and bases (n, k), all of one r and one k."""
        operation: FactorImages = self._operation(
            ("images", batch, len(factors)),
            len(factors),
            lambda rows: FactorImages(rows, self._device, self._profile),
        )
        operation.stage(factors, bases)
        self._staged.append(operation)
        return operation

    def project_factors(self, operation: FactorImages) -> Tensor:
        """T (count, r, k) in float32, of an operation of :meth:`stage_factors`."""
        with self._scratch.lock:
            self._queue(operation)
            return operation.images(self._scratch)

    def stage_factor_gradients(self, batch: int, grads: Sequence[Tensor], bases: Sequence[Tensor]) -> FactorGradients:
        """Prepare ``G += X V^T`` of a batch of gradients (r, n) and bases (n, k), all of one r and one k."""
        operation: FactorGradients = self._operation(
            ("factors", batch, len(grads)),
            len(grads),
            lambda rows: FactorGradients(rows, self._device, self._profile),
        )
        operation.stage(grads, bases)
        self._staged.append(operation)
        return operation

    def add_factors_(self, operation: FactorGradients, coefficients: Tensor) -> None:
        """Add to the gradients of an operation of :meth:`stage_factor_gradients`; X is (count, r, k) in float32."""
        operation.write(coefficients)
        self._queue(operation)

    def _device_scales(self) -> Tensor:
        if self._scales is None:
            with torch.inference_mode(False):
                self._scales = torch.empty(max(1, self._offsets[-1]), dtype=torch.float32, device=self._device)
        return self._scales

    def send(self) -> None:
        """Send the rows of the table that have changed.

        Raises:
            NoKernel, ValueError: a kernel of a staged operation is missing, or must not run here. Nothing has been
                launched.
        """
        with self._scratch.lock:
            for operation in self._staged:
                if not operation.is_bound(self._scratch):
                    self._scratch.reserve(operation.sizes)
            for operation in self._staged:
                operation.bind(self._scratch)
            for table in self._tables:
                table.send()

    def turn(self) -> AbstractContextManager[Any]:
        """The lock to hold while a batch is projected and pulled back, where its drifts are not kept."""
        return self._scratch.lock

    def project(self, batch: int) -> list[Tensor]:
        """The drifts of a batch; [] where they are not kept."""
        self._queue(self.operations["project", batch])
        return self._drifts.get(batch, [])

    def squares_of(self, batch: int) -> Tensor:
        """The squares of a projected batch, a view of :attr:`squares`."""
        return self.squares[self._offsets[batch] : self._offsets[batch + 1]]

    def pull_back_(self, operation: AnyOperation, scales: Sequence[float] | Tensor = ()) -> None:
        """Queue an operation of :meth:`stage_pull_back`; ``scales`` again where they lie on the device."""
        with self._scratch.lock:
            if isinstance(scales, Tensor):
                self._device_scales()[: len(scales)].copy_(scales)
            self._queue(operation)

    def _queue(self, operation: AnyOperation) -> None:
        with self._scratch.lock:
            if not operation.is_bound(self._scratch):
                # Another program of this stream needed larger buffers meanwhile.
                self.send()
            operation.queue()


def new_drifts(ranks: Sequence[int], device: torch.device) -> list[Tensor]:
    """Memory for C (k, k) of each rank, in float32, an allocation each: an operator's results may not share any."""
    return [torch.empty((rank, rank), dtype=torch.float32, device=device) for rank in ranks]
