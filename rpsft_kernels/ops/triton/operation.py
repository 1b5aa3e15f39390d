"""One operation on the weights of a batch, prepared for one stream: its rows of the table and its launches.

An operation is staged at every call with the tensors at hand. Equal tensors cost a comparison; others at other
addresses, that lie alike, cost their columns of the table; all else is planned anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from ..operands import Operands
from .device import Profile
from .launch import Launch
from .layout import Facts, Problem
from .schedule import Schedule
from .scratch import Scratch, Sizes
from .table import SCALE, Rows, float_bits, place_scales
from .upload import upload_schedule
from .variants import Variant, squares_variant


class Plan(Protocol):
    """The plan of one group of weights, whatever the operation."""

    @property
    def columns(self) -> Mapping[str, Sequence[int]]:
        """The columns of the group's rows that depend on the plan alone."""


Key = TypeVar("Key")
PlanT = TypeVar("PlanT", bound=Plan)


@dataclass(frozen=True)
class LaunchGroup(Generic[Key]):
    """The weights of a batch that share launches, by their places in it."""

    key: Key
    members: list[int]
    problems: tuple[Problem, ...]


class Operation(ABC, Generic[Key, PlanT]):
    """``count`` weights on ``rows``. Subclasses say how they are planned, and which launches that takes."""

    sizes = Sizes()
    _groups: list[tuple[LaunchGroup[Key], PlanT]]

    def __init__(self, rows: Rows, device: torch.device, profile: Profile) -> None:
        self.rows, self.device, self.profile = rows, device, profile
        self._facts: Sequence[Facts] | None = None
        self._next_facts: Sequence[Facts] | None = None
        self._columns: dict[str, list[int]] = {}
        self._order: list[int] = []
        self._generation = -1
        self._launches: list[Launch] = []
        # Whether anchors are cast at every call, and the casts of this one, which the launches read.
        self._casts = False
        self._held: list[Tensor] = []

    def is_alike(self, facts: Sequence[Facts]) -> bool:
        """Whether matrices (at other addresses, perhaps) lie as those did that were planned for.

        :meth:`bind` notes the facts of others, once they are planned: matrices that are refused before are planned anew
        at the next call, and refused again.
        """
        if facts == self._facts:
            return True
        self._facts, self._next_facts, self._generation = None, facts, -1
        self._columns.clear()
        return False

    def hold_casts(self, read: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        """Keep the tensors that are read in place of the given ones until :meth:`release`."""
        self._held = [new for new, old in zip(read, given, strict=True) if new is not old]
        self._casts = bool(self._held)

    def release(self) -> None:
        """Let go of the casts of a call, all of whose launches are queued."""
        self._held = []

    def assign_rows(self, groups: Sequence[LaunchGroup[Key]]) -> None:
        """Give the groups their rows, one behind the other."""
        self._order = [member for group in groups for member in group.members]

    def set_column(self, column: str, values: list[int]) -> None:
        """Write a column, given by the weights' places in the batch, where it differs."""
        if self._columns.get(column) != values:
            self.rows.write(column, [values[i] for i in self._order])
            self._columns[column] = values

    def bind(self, scratch: Scratch) -> None:
        """Prepare the launches, where planning or a move of the scratch memory has made those at hand stale.

        Raises:
            NoKernel, ValueError: a kernel is missing, or must not run here.
        """
        if self._generation != scratch.generation:
            self._launches = self._prepare_launches(scratch)
            self._generation, self._facts = scratch.generation, self._next_facts
        self.place_drifts()

    def is_bound(self, scratch: Scratch) -> bool:
        """Whether the launches at hand still serve."""
        return self._generation == scratch.generation

    def place_drifts(self) -> None:
        """Write the addresses of C, which may be in the scratch memory."""

    def queue(self) -> None:
        """Queue the launches."""
        for launch in self._launches:
            launch()

    def _prepare_launches(self, scratch: Scratch) -> list[Launch]:
        self.place(scratch)
        launches: list[Launch] = []
        begin = 0
        for group, plan in self._groups:
            rows = self.rows.slice(begin, len(group.members))
            begin += len(group.members)
            for name, values in plan.columns.items():
                rows.write(name, values)
            launches += self.launches_of(plan, rows, scratch)
        return launches

    @abstractmethod
    def place(self, scratch: Scratch) -> None:
        """Write the columns that depend on where the rows and the scratch memory lie."""

    @abstractmethod
    def launches_of(self, plan: PlanT, rows: Rows, scratch: Scratch) -> list[Launch]:
        """The launches of one group, in order."""

    def prepare_launch(self, variant: Variant, schedule: Schedule, rows: Rows, *arguments: Tensor) -> Launch:
        """The launch of a variant over ``rows``."""
        arrays = upload_schedule(schedule, self.device)
        return Launch(variant, schedule.programs_with_work, self.device, rows.memory(), *arrays, *arguments)


class ProjectionOperation(Operation[Key, PlanT]):
    """The squares of one batch, of whichever form, go to ``squares`` (float32) from ``number`` on."""

    def __init__(self, rows: Rows, device: torch.device, profile: Profile, squares: Tensor, number: int) -> None:
        super().__init__(rows, device, profile)
        self._squares, self._number = squares, number

    @abstractmethod
    def stage(self, operands: Operands, drifts: list[int] | None) -> None:
        """Take the tensors of a call.

        Args:
            operands: W and the anchors of the batch.
            drifts: addresses for C (k, k) in float32; None: they stay in the scratch memory. Full anchors have none.
        """

    def place(self, scratch: Scratch) -> None:
        self.set_column("NUMBER", list(range(self._number, self._number + self.rows.count)))

    def add_squares(self, rows: Rows, scratch: Scratch) -> Launch:
        """The launch that adds the squares of tiles, one sum for each weight."""
        return Launch(squares_variant(), rows.count, self.device, rows.memory(), scratch.slots, self._squares)


class PullBackOperation(Operation[Key, PlanT]):
    """The gradients of one batch, of whichever form, written or added to with ``accumulate``.

    ``scales``: float32 memory on the device; None where the scales travel with the table.
    """

    # The memory in which kernels find the scales, once it is placed.
    _scale_memory: Tensor

    def __init__(
        self, rows: Rows, device: torch.device, profile: Profile, accumulate: bool, scales: Tensor | None
    ) -> None:
        super().__init__(rows, device, profile)
        self._accumulate, self._scales = accumulate, scales
        # The scales as they were last written.
        self._numbers: list[float] | None = None

    def is_alike(self, facts: Sequence[Facts]) -> bool:
        alike = super().is_alike(facts)
        if not alike:
            self._numbers = None
        return alike

    def stage(
        self,
        operands: Operands,
        grads: Sequence[Facts],
        addresses: list[int],
        drifts: Any,
        scales: Sequence[float] | None,
    ) -> None:
        """Take the gradients of a call, and the scales where these travel with the table.

        Args:
            operands: the anchors, with W where they are full ones.
            grads: how the gradients lie.
            addresses: where they lie.
            drifts: where C (k, k) lie, see :meth:`PullBack.stage`. Full anchors have none.
            scales: one for each gradient; None: they are on the device.
        """
        self.place_operands(operands, grads)
        self.set_column("GRAD", addresses)
        if scales is not None and scales != self._numbers:
            self._numbers = list(scales)
            self.set_column(SCALE, float_bits(scales))

    @abstractmethod
    def place_operands(self, operands: Operands, grads: Sequence[Facts]) -> None:
        """Write the addresses of what is read, and plan anew where the gradients do not lie as before."""

    @abstractmethod
    def expects(self, operands: Operands, grads: Sequence[Facts]) -> bool:
        """Whether it is prepared for operands and gradients that lie like these."""

    def place(self, scratch: Scratch) -> None:
        self._scale_memory = place_scales(self.rows, self._order, self._scales)


def group_by_key(described: Sequence[tuple[Key, Problem]]) -> list[LaunchGroup[Key]]:
    """Weights of equal keys in one group each, in the order of their first members."""
    members_of: dict[Key, list[int]] = {}
    for i, (key, _) in enumerate(described):
        members_of.setdefault(key, []).append(i)
    return [LaunchGroup(key, members, tuple(described[i][1] for i in members)) for key, members in members_of.items()]


def facts_of(matrices: Sequence[Tensor]) -> list[Facts]:
    """Everything about the matrices but their addresses that decides how kernels read them."""
    # Plain tuples: this runs for every weight of every step.
    return [(m.shape, m.stride(), m.dtype, m.data_ptr() & 15) for m in matrices]  # type: ignore[misc]
