"""Full anchors on the kernels: ``||W - W0||_F^2`` and its gradient, grouped like the rest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ..operands import Operands, cast_base
from .launch import Launch
from .layout import READABLE, Facts, FullKey, Problem, addresses_of, layout_of, static_columns, type_name
from .operation import Operation, ProjectionOperation, PullBackOperation, facts_of, group_by_key
from .schedule import Grid, Schedule, build_schedule
from .scratch import Scratch, Sizes
from .table import Rows
from .variants import Variant, full_drift_variant, full_gradient_variant


@dataclass(frozen=True, eq=False)
class FullPlan:
    """One elementwise launch over one group. ``slots``: the tiles of each weight."""

    variant: Variant
    schedule: Schedule
    columns: dict[str, list[int]]
    slots: list[int]


@lru_cache(maxsize=1024)
def plan_full(variant: Variant, problems: tuple[Problem, ...], multiprocessors: int) -> FullPlan:
    """The launch for weights of one group of full anchors."""
    m, n, _ = variant.blocks
    grids = tuple(Grid(-(-p.rows // m), -(-p.cols // n), 1, m * n) for p in problems)
    schedule = build_schedule(grids, multiprocessors * variant.blocks_per_sm, False)
    return FullPlan(variant, schedule, static_columns(problems), [grid.tiles for grid in grids])


def describe_full(weight: Facts, base: Facts, grad: Facts | None) -> tuple[FullKey, Problem]:
    """The key that decides the launches of a full anchor's weight, and the weight's static description."""
    flipped = layout_of(weight, False).rows_contiguous
    matrices = [layout_of(facts, flipped) for facts in (weight, base) + (() if grad is None else (grad,))]
    rows, cols = (weight[0][1], weight[0][0]) if flipped else (weight[0][0], weight[0][1])
    key = FullKey(
        weight=type_name(weight[2]),
        base=type_name(base[2]),
        grad=None if grad is None else type_name(grad[2]),
        flipped=flipped,
        aligned=cols % 8 == 0 and all(matrix.pointer and not matrix.rows_contiguous for matrix in matrices),
    )
    grad_strides = (0, 0) if grad is None else matrices[2].strides
    return key, Problem(rows, cols, 0, weight=matrices[0].strides, base=matrices[1].strides, grad=grad_strides)


class _FullOperation(Operation[FullKey, FullPlan]):
    def place_operands(self, operands: Operands, grads: Sequence[Facts] | None) -> None:
        weights = operands.weights
        facts = facts_of(weights)
        alike = self.is_alike(facts if grads is None else [*facts, *grads])
        if not alike or self._casts:
            pretrained = [
                cast_base(weight, base, READABLE) for weight, base in zip(weights, operands.pretrained, strict=True)
            ]
            self.hold_casts(pretrained, operands.pretrained)
            if not alike:
                targets: Sequence[Facts | None] = [None] * len(weights) if grads is None else grads
                self._plan(facts, facts_of(pretrained), targets)
            self.set_column("BASE", addresses_of(pretrained))
        self.set_column("WEIGHT", addresses_of(weights))

    def _plan(self, weights: Sequence[Facts], pretrained: Sequence[Facts], grads: Sequence[Facts | None]) -> None:
        groups = group_by_key(list(map(describe_full, weights, pretrained, grads)))
        self._groups = [
            (group, plan_full(self.variant(group.key), group.problems, self.profile.multiprocessors))
            for group in groups
        ]
        self.assign_rows(groups)

    @abstractmethod
    def variant(self, key: FullKey) -> Variant:
        """The kernel that serves weights of a key."""


class FullProjection(_FullOperation, ProjectionOperation[FullKey, FullPlan]):
    """The squares of full anchors of one batch; there are no drifts."""

    def stage(self, operands: Operands, drifts: list[int] | None) -> None:
        self.place_operands(operands, None)
        self.sizes = Sizes(slots=max(sum(plan.slots) for _, plan in self._groups))

    def variant(self, key: FullKey) -> Variant:
        return full_drift_variant(self.profile.architecture, key.weight, key.base, key.aligned)

    def launches_of(self, plan: FullPlan, rows: Rows, scratch: Scratch) -> list[Launch]:
        rows.write("SQUARES", list(accumulate(plan.slots, initial=0))[:-1])
        rows.write("SLOTS", plan.slots)
        return [
            self.prepare_launch(plan.variant, plan.schedule, rows, scratch.slots),
            self.add_squares(rows, scratch),
        ]


class FullPullBack(_FullOperation, PullBackOperation[FullKey, FullPlan]):
    """``grads = scale * (W - W0)``, or ``+=`` with ``accumulate``, of full anchors of one batch."""

    def expects(self, operands: Operands, grads: Sequence[Facts]) -> bool:
        return [*facts_of(operands.weights), *grads] == self._facts

    def variant(self, key: FullKey) -> Variant:
        assert key.grad is not None
        architecture = self.profile.architecture
        return full_gradient_variant(architecture, key.weight, key.base, key.grad, key.aligned, self._accumulate)

    def launches_of(self, plan: FullPlan, rows: Rows, scratch: Scratch) -> list[Launch]:
        return [self.prepare_launch(plan.variant, plan.schedule, rows, self._scale_memory)]
