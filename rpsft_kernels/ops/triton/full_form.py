"""Full anchors on the kernels: ``||W - W0||_F^2`` and its gradient, grouped like the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate as running_sums

import torch
from torch import Tensor

from ..operands import Operands, cast_base
from .device import Profile
from .launch import Launch
from .layout import READABLE, Facts, FullKey, Problem, addresses_of, layout_of, static_columns, type_name
from .operation import LaunchGroup, Operation, facts_of, group_by_key
from .schedule import Grid, Schedule, build_schedule
from .scratch import Scratch, Sizes
from .table import SCALE, Rows, float_bits, place_scales
from .variants import Variant, full_drift_variant, full_gradient_variant, squares_variant


def describe(weight: Facts, base: Facts, grad: Facts | None) -> tuple[FullKey, Problem]:
    """What decides the launches of a full anchor's weight, and its static description."""
    flipped = layout_of(weight, False).rows_contiguous
    pieces = [layout_of(piece, flipped) for piece in (weight, base) + (() if grad is None else (grad,))]
    rows, cols = (weight[0][1], weight[0][0]) if flipped else (weight[0][0], weight[0][1])
    aligned = cols % 8 == 0 and all(p.pointer and not p.rows_contiguous for p in pieces)
    types = type_name(weight[2]), type_name(base[2]), None if grad is None else type_name(grad[2])
    grad_strides = (0, 0) if grad is None else pieces[2].strides
    problem = Problem(rows, cols, 0, pieces[0].strides, pieces[1].strides, grad=grad_strides)
    return FullKey(*types, flipped, aligned), problem


@lru_cache(maxsize=1024)
def plan_full(variant: Variant, problems: tuple[Problem, ...], multiprocessors: int) -> Schedule:
    """The schedule of an elementwise launch."""
    m, n, _ = variant.blocks
    grids = tuple(Grid(-(-p.rows // m), -(-p.cols // n), 1, m * n) for p in problems)
    return build_schedule(grids, multiprocessors * variant.blocks_per_sm, False)


class _FullOperation(Operation[FullKey]):
    _groups: list[tuple[LaunchGroup[FullKey], Variant, Schedule]]

    def _place(self, operands: Operands, grads: Sequence[Facts] | None) -> None:
        weights, pretrained = operands.weights, operands.pretrained
        facts = facts_of(weights)
        alike = self.is_alike(facts if grads is None else [*facts, *grads])
        if not alike or self._casts:
            bases = [cast_base(weight, base, READABLE) for weight, base in zip(weights, pretrained, strict=True)]
            self.hold_casts(bases, pretrained)
            if not alike:
                targets: Sequence[Facts | None] = [None] * len(weights) if grads is None else grads
                described = map(describe, facts, facts_of(bases), targets)
                groups = group_by_key(list(described))
                variants = [self.variant(group.key) for group in groups]
                self._groups = [
                    (group, variant, plan_full(variant, group.problems, self.profile.multiprocessors))
                    for group, variant in zip(groups, variants, strict=True)
                ]
                self.order(groups)
            self.move("BASE", addresses_of(bases))
        self.move("WEIGHT", addresses_of(weights))

    @abstractmethod
    def variant(self, key: FullKey) -> Variant:
        """The kernel that serves weights of a key."""


def _slots(group: LaunchGroup[FullKey], variant: Variant) -> list[int]:
    m, n, _ = variant.blocks
    return [-(-p.rows // m) * -(-p.cols // n) for p in group.problems]


class FullProjection(_FullOperation):
    """Squares of full anchors of one batch, in ``squares`` (float32) from ``number`` on."""

    def __init__(self, rows: Rows, device: torch.device, profile: Profile, squares: Tensor, number: int) -> None:
        super().__init__(rows, device, profile)
        self._squares, self._number = squares, number

    def stage(self, operands: Operands, drifts: list[int] | None) -> None:
        """Take the tensors of a call; there are no drifts."""
        self._place(operands, None)
        self.sizes = Sizes(slots=max(sum(_slots(group, variant)) for group, variant, _ in self._groups))

    def variant(self, key: FullKey) -> Variant:
        return full_drift_variant(self.profile.architecture, key.weight, key.base, key.aligned)

    def launches(self, scratch: Scratch) -> list[Launch]:
        self.move("NUMBER", list(range(self._number, self._number + self.rows.count)))
        found, begin = [], 0
        for group, variant, schedule in self._groups:
            rows = self.rows.part(begin, len(group.members))
            begin += len(group.members)
            slots = _slots(group, variant)
            first = [0, *running_sums(slots)][:-1]
            for name, values in (static_columns(group.problems) | {"SQUARES": first, "SLOTS": slots}).items():
                rows.write(name, values)
            found.append(self.scheduled(variant, schedule, rows, scratch.slots))
            found.append(
                Launch(squares_variant(), rows.count, self.device, rows.memory(), scratch.slots, self._squares)
            )
        return found


class FullPullBack(_FullOperation):
    """``grads = scale * (W - W0)``, or ``+=`` with ``accumulate``, of full anchors of one batch."""

    def __init__(
        self, rows: Rows, device: torch.device, profile: Profile, accumulate: bool, scales: Tensor | None
    ) -> None:
        super().__init__(rows, device, profile)
        self._accumulate, self._scales = accumulate, scales

    def stage(
        self,
        operands: Operands,
        grads: Sequence[Facts],
        addresses: list[int],
        drifts: object,
        scales: Sequence[float] | None,
    ) -> None:
        """Take the gradients of a call, and the scales where these travel with the table."""
        self._place(operands, grads)
        self.move("GRAD", addresses)
        if scales is not None and scales != self._numbers:
            self._numbers = list(scales)
            self.move(SCALE, float_bits(scales))

    def expects(self, operands: Operands, grads: Sequence[Facts]) -> bool:
        """Whether it is prepared for weights and gradients that lie like these."""
        return [*facts_of(operands.weights), *grads] == self._facts

    def variant(self, key: FullKey) -> Variant:
        assert key.grad is not None
        architecture = self.profile.architecture
        return full_gradient_variant(architecture, key.weight, key.base, key.grad, key.aligned, self._accumulate)

    def launches(self, scratch: Scratch) -> list[Launch]:
        scales = place_scales(self.rows, self._order, self._scales)
        found, begin = [], 0
        for group, variant, schedule in self._groups:
            rows = self.rows.part(begin, len(group.members))
            begin += len(group.members)
            for name, values in static_columns(group.problems).items():
                rows.write(name, values)
            found.append(self.scheduled(variant, schedule, rows, scales))
        return found
