"""One operation on the weights of a batch, prepared for one stream: its rows of the table and its launches.

An operation is staged at every call with the tensors at hand. Equal tensors cost a comparison; others at other
addresses, that lie alike, cost their columns of the table; all else is planned anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from .device import Profile
from .launch import Launch
from .layout import Facts, Problem
from .schedule import Schedule
from .scratch import Scratch, Sizes
from .table import Rows
from .upload import upload_schedule
from .variants import Variant

Key = TypeVar("Key")


@dataclass(frozen=True)
class LaunchGroup(Generic[Key]):
    """The weights of a batch that share launches, by their places in it."""

    key: Key
    members: list[int]
    problems: tuple[Problem, ...]


class Operation(ABC, Generic[Key]):
    """``count`` weights on ``rows``. Subclasses say how they are planned, and which launches that takes."""

    sizes = Sizes()

    def __init__(self, rows: Rows, device: torch.device, profile: Profile) -> None:
        self.rows, self.device, self.profile = rows, device, profile
        self._facts: Sequence[Facts] | None = None
        self._next_facts: Sequence[Facts] | None = None
        self._columns: dict[str, list[int]] = {}
        self._order: list[int] = []
        self._generation = -1
        # The scales as they were last written.
        self._numbers: list[float] | None = None
        self._launches: list[Launch] = []
        # Whether anchors are cast at every call, and the casts of this one, which the launches read.
        self._casts = False
        self._held: list[Tensor] = []

    def is_alike(self, facts: Sequence[Facts]) -> bool:
        """Whether matrices (at other addresses, perhaps) lie as those did that were planned for. Others are noted by
        :meth:`bind`: what is refused before it is planned anew, and refused again, at the next call.
        """
        if facts == self._facts:
            return True
        self._facts, self._next_facts, self._generation = None, facts, -1
        self._columns.clear()
        self._numbers = None
        return False

    def hold_casts(self, read: Iterable[Tensor], given: Iterable[Tensor]) -> None:
        """Keep the tensors that are read in place of the given ones until :meth:`release`."""
        self._held = [new for new, old in zip(read, given, strict=True) if new is not old]
        self._casts = bool(self._held)

    def release(self) -> None:
        """Let go of the casts of a call, all of whose launches are queued."""
        self._held = []

    def order(self, groups: Sequence[LaunchGroup[Key]]) -> None:
        """Give the groups their rows, one behind the other."""
        self._order = [member for group in groups for member in group.members]

    def move(self, column: str, values: list[int]) -> None:
        """Set a column, by the weights' places in the batch, where it differs."""
        if self._columns.get(column) != values:
            self.rows.write(column, [values[i] for i in self._order])
            self._columns[column] = values

    def bind(self, scratch: Scratch) -> None:
        """Make the launches, where planning or a move of the scratch memory has made those at hand stale.

        Raises:
            NoKernel, ValueError: a kernel is missing, or must not run here.
        """
        if self._generation != scratch.generation:
            self._launches = self.launches(scratch)
            self._generation, self._facts = scratch.generation, self._next_facts
        self.place_drifts()

    def is_bound(self, scratch: Scratch) -> bool:
        return self._generation == scratch.generation

    def place_drifts(self) -> None:
        """Say where C lies, which may be in the scratch memory."""

    @abstractmethod
    def launches(self, scratch: Scratch) -> list[Launch]:
        """The launches, in order."""

    def run(self) -> None:
        """Queue the launches."""
        for launch in self._launches:
            launch()

    def scheduled(self, variant: Variant, schedule: Schedule, rows: Rows, *arguments: Tensor) -> Launch:
        """The launch of a variant over ``rows``."""
        arrays = upload_schedule(schedule, self.device)
        return Launch(variant, schedule.programs_with_work, self.device, rows.memory(), *arrays, *arguments)


def group_by_key(described: Sequence[tuple[Key, Problem]]) -> list[LaunchGroup[Key]]:
    found: dict[Key, list[int]] = {}
    for i, (key, _) in enumerate(described):
        found.setdefault(key, []).append(i)
    return [LaunchGroup(key, members, tuple(described[i][1] for i in members)) for key, members in found.items()]


def facts_of(matrices: Sequence[Tensor]) -> list[Facts]:
    # Plain tuples: this runs for every weight of every step.
    return [(m.shape, m.stride(), m.dtype, m.data_ptr() & 15) for m in matrices]  # type: ignore[misc]
