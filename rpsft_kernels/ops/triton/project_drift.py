"""``project_drift`` on the kernels: phases 1 and 2 and the sums of squares, in three or four launches a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain

import torch
from torch import Tensor

from ...costs import stretches_of
from ..operands import Operands, cast_base
from .device import Profile, access_of
from .launch import Launch
from .layout import (
    READABLE,
    Facts,
    Problem,
    ProjectKey,
    addresses_of,
    is_transposed,
    layout_of,
    round_up,
    static_columns,
    to_aligned_float32,
    type_name,
)
from .operation import ProjectionOperation, facts_of, group_by_key
from .schedule import Grid, Schedule, build_schedule, splits_of
from .scratch import Scratch, Sizes
from .table import Rows
from .tile_table import rank_class
from .variants import (
    SPECIALISED,
    Precision,
    Variant,
    drift_variant,
    project_variant,
    reduce_variant,
)


@dataclass(frozen=True, eq=False)
class ForwardPlan:
    """Everything about one group that does not change from step to step. Sizes are in elements."""

    project: Variant
    drift: Variant
    project_schedule: Schedule
    drift_schedule: Schedule
    reduce_schedule: Schedule | None
    columns: dict[str, list[int]]
    planes_offsets: list[int]
    planes_size: int
    partial_offsets: list[int]
    partial_size: int
    slots: int

    @property
    def workspace_bytes(self) -> int:
        return 2 * self.planes_size + 4 * self.partial_size + 4 * self.slots

    @property
    def schedules(self) -> list[Schedule]:
        schedules = (self.project_schedule, self.drift_schedule, self.reduce_schedule)
        return [schedule for schedule in schedules if schedule is not None]


# How much longer a tile of half the width takes than half of a whole one: it reads as much of W for half the products.
# Not measured. On an H200 prototypes with tiles of 256 and 192 columns took 1 and 0.84 a step: a straight line through
# both gives 1.35, equal bytes per second from the second-level cache 1.43 to 1.5.
_NARROW_TIME = 1.4


def _choose_project(
    profile: Profile, key: ProjectKey, problems: tuple[Problem, ...], drift: Variant
) -> tuple[Variant, list[tuple[int, int]], Schedule]:
    """The variant that is estimated to project these weights soonest, the extents of their T, and the schedule.

    Narrow tiles pay where wide ones leave multiprocessors idle, or reach far beyond the rank. The bits of T do not
    depend on the choice: every element is the same sum.
    """
    _, dn, dk = drift.blocks
    access = access_of(profile, key.aligned, False)
    variant_of = partial(project_variant, profile.architecture, key.precision, key.rank_class, key.rows_contiguous)
    choices = []
    for narrow in (False, True):
        variant = variant_of(access, narrow)
        pm, pn, pk = variant.blocks
        # T is padded to whole tiles of both phases.
        padded = [(round_up(p.rows, max(pm, dk)), round_up(p.rank, max(pn, dn))) for p in problems]
        cuts = [_stretches(variant, p) for p in problems]
        grids = tuple(
            Grid(height // pm, width // pn, cut, pm * pn * round_up(-(-p.cols // cut), pk))
            for p, cut, (height, width) in zip(problems, cuts, padded, strict=True)
        )
        schedule = build_schedule(grids, profile.multiprocessors * variant.blocks_per_sm, False)
        whole = all((p.rows, p.rank) == size for p, size in zip(problems, padded, strict=True))
        even = whole and all(p.cols % pk == 0 for p in problems)
        chosen = variant_of(access_of(profile, key.aligned, even), narrow)
        choices.append((schedule.longest_cost * (_NARROW_TIME if narrow else 1.0), chosen, padded, schedule))
    # The first of equals: where a table has no narrow tiles, both are the same.
    _, variant, padded, schedule = min(choices, key=lambda choice: choice[0])
    return variant, padded, schedule


def _stretches(project: Variant, problem: Problem) -> int:
    """Only the warp-specialised kernel cuts its sums."""
    return stretches_of(problem.cols) if project.kernel in SPECIALISED else 1


@lru_cache(maxsize=1024)
def plan_forward(
    profile: Profile, key: ProjectKey, problems: tuple[Problem, ...], has_block: bool, drift_aligned: bool
) -> ForwardPlan:
    """The launches for weights of one group (not full anchors)."""
    arch, precision, rank = profile.architecture, key.precision, key.rank_class

    def drift_of(even: bool) -> Variant:
        access = access_of(profile, key.aligned, even)
        return drift_variant(
            arch, precision, rank, key.transposed, access, drift_aligned=drift_aligned, has_block=has_block
        )

    dm, dn, dk = drift_of(False).blocks
    project, padded, project_schedule = _choose_project(profile, key, problems, drift_of(False))
    drift = drift_of(
        drift_aligned and all(p.rank % dm == 0 and p.rank % dn == 0 and p.rows % dk == 0 for p in problems)
    )
    planes = precision.planes
    names = ("PLANES_ROW", "PLANES_ROWS", "STRETCHES", "SPLITS", "SQUARES", "SLOTS")
    columns: dict[str, list[int]] = {name: [] for name in names}
    drift_grids, reduce_grids = [], []
    planes_offsets, partial_offsets = [], []
    planes_size = partial_size = slots = 0
    for p, (height, width) in zip(problems, padded, strict=True):
        high, wide = -(-p.rank // dm), -(-p.rank // dn)
        stretches, row_splits = _stretches(project, p), splits_of(p.rows, p.rank, dm, dn)
        splits = stretches * row_splits
        drift_grids.append(Grid(high, wide, splits, dm * dn * round_up(-(-p.rows // row_splits), dk) * planes))
        reduce_grids.append(Grid(high, wide, int(splits > 1), splits))
        for name, value in (
            ("PLANES_ROW", width),
            ("PLANES_ROWS", height),
            ("STRETCHES", stretches),
            ("SPLITS", splits),
            ("SQUARES", slots),
            ("SLOTS", high * wide),
        ):
            columns[name].append(value)
        planes_offsets.append(planes_size)
        partial_offsets.append(partial_size)
        planes_size += stretches * planes * height * width
        partial_size += splits * high * wide * dm * dn if splits > 1 else 0
        slots += high * wide
    columns |= static_columns(problems)
    reduces = any(grid.tiles for grid in reduce_grids)
    drift_programs = profile.multiprocessors * drift.blocks_per_sm
    return ForwardPlan(
        project=project,
        drift=drift,
        project_schedule=project_schedule,
        drift_schedule=build_schedule(tuple(drift_grids), drift_programs, False),
        reduce_schedule=build_schedule(tuple(reduce_grids), drift_programs, False) if reduces else None,
        columns=columns,
        planes_offsets=planes_offsets,
        planes_size=planes_size,
        partial_offsets=partial_offsets,
        partial_size=partial_size,
        slots=slots,
    )


def describe_projected(
    weight: Facts, left: Facts, right: Facts, base: Facts | None, profile: Profile
) -> tuple[ProjectKey, Problem]:
    """The key that decides the launches of a projected weight, and the weight's static description."""
    transposed = is_transposed(weight[0])
    if transposed:
        left, right = right, left
    rank = left[0][1]
    matrices = [layout_of(weight, transposed)]
    if base is not None:
        matrices.append(layout_of(base, transposed))
    subspaces = [layout_of(left, False), layout_of(right, False)]
    aligned = all(m.descriptor if profile.descriptors else m.pointer for m in matrices + subspaces)
    aligned = aligned and len({m.rows_contiguous for m in matrices}) == 1
    aligned = aligned and not any(s.rows_contiguous for s in subspaces)
    # C and B are read and written in vectors where all else is.
    aligned = aligned and rank % 4 == 0
    key = ProjectKey(
        precision=Precision(type_name(weight[2]), None if base is None else type_name(base[2]), type_name(left[2])),
        rank_class=rank_class(rank),
        transposed=transposed,
        rows_contiguous=aligned and matrices[0].rows_contiguous,
        aligned=aligned,
    )
    rows, cols = sorted(weight[0])
    problem = Problem(
        rows,
        cols,
        rank,
        weight=matrices[0].strides,
        base=(0, 0) if base is None else matrices[1].strides,
        left=subspaces[0].strides,
        right=subspaces[1].strides,
    )
    return key, problem


class Projection(ProjectionOperation[ProjectKey, ForwardPlan]):
    """Drifts and squares of the projected weights (base, block and bare forms) of one batch."""

    def __init__(self, rows: Rows, device: torch.device, profile: Profile, squares: Tensor, number: int) -> None:
        super().__init__(rows, device, profile, squares, number)
        self._drifts: list[int] | None = None
        # The addresses that the C of this batch have in the scratch memory.
        self.scratch_drifts: list[int] = []

    def stage(self, operands: Operands, drifts: list[int] | None) -> None:
        weights = operands.weights
        addresses = [weight.data_ptr() for weight in weights]
        alike = self.is_alike(facts_of(weights))
        if not alike or self._casts:
            operands = self._cast(operands)
        if not alike:
            self._plan(operands)
        if not alike or self._casts:
            self._place_anchors(operands)
        self.set_column("WEIGHT", addresses)
        if (drifts is None) != (self._drifts is None):
            # The operation is bound anew, with or without room for the drifts in the scratch memory.
            self._generation = -1
        self._drifts = drifts
        self.sizes = self._sizes._replace(drifts=self._sizes.drifts if drifts is None else 0)

    def place_drifts(self) -> None:
        self.set_column("DRIFT", self.scratch_drifts if self._drifts is None else self._drifts)

    def _cast(self, operands: Operands) -> Operands:
        cast = operands.cast_subspaces()
        pretrained = [
            cast_base(w, base, READABLE) for w, base in zip(operands.weights, operands.pretrained, strict=False)
        ]
        cast = cast._replace(pretrained=pretrained, blocks=[to_aligned_float32(block) for block in operands.blocks])
        self.hold_casts(chain(*cast[1:]), chain(*operands[1:]))
        return cast

    def _plan(self, operands: Operands) -> None:
        pretrained: Sequence[Facts | None] = facts_of(operands.pretrained) or [None] * len(operands.weights)
        lefts, rights = facts_of(operands.lefts), facts_of(operands.rights)
        facts = zip(facts_of(operands.weights), lefts, rights, pretrained, strict=True)
        groups = group_by_key([describe_projected(*each, self.profile) for each in facts])
        has_block = bool(operands.blocks)
        self._groups = [
            (group, plan_forward(self.profile, group.key, group.problems, has_block, group.key.aligned))
            for group in groups
        ]
        self.assign_rows(groups)
        offsets, size = [], 0
        for left in operands.lefts:
            offsets.append(4 * size)
            # Each C begins at a multiple of 16 bytes, as fresh tensors do.
            size += round_up(left.shape[1] ** 2, 4)
        self._drift_offsets = offsets
        self._sizes = Sizes(
            planes=max(plan.planes_size for _, plan in self._groups),
            partial=max(plan.partial_size for _, plan in self._groups),
            slots=max(plan.slots for _, plan in self._groups),
            drifts=size,
        )

    def _place_anchors(self, operands: Operands) -> None:
        transposed = {i: group.key.transposed for group, _ in self._groups for i in group.members}
        pairs = list(zip(operands.lefts, operands.rights, strict=True))
        turned = [(v, u) if transposed[i] else (u, v) for i, (u, v) in enumerate(pairs)]
        nothing = [0] * len(pairs)
        self.set_column("LEFT", [left.data_ptr() for left, _ in turned])
        self.set_column("RIGHT", [right.data_ptr() for _, right in turned])
        self.set_column("BASE", addresses_of(operands.pretrained) or nothing)
        self.set_column("BLOCK", addresses_of(operands.blocks) or nothing)

    def place(self, scratch: Scratch) -> None:
        super().place(scratch)
        first_drift = scratch.drifts.data_ptr()
        self.scratch_drifts = [first_drift + offset for offset in self._drift_offsets]

    def launches_of(self, plan: ForwardPlan, rows: Rows, scratch: Scratch) -> list[Launch]:
        rows.write("PLANES", [scratch.planes.data_ptr() + 2 * offset for offset in plan.planes_offsets])
        rows.write("PARTIAL", [scratch.partial.data_ptr() + 4 * offset for offset in plan.partial_offsets])
        launches = [
            self.prepare_launch(plan.project, plan.project_schedule, rows),
            self.prepare_launch(plan.drift, plan.drift_schedule, rows, scratch.slots),
        ]
        if plan.reduce_schedule is not None:
            reduce = reduce_variant(plan.drift)
            launches.append(self.prepare_launch(reduce, plan.reduce_schedule, rows, scratch.slots))
        return [*launches, self.add_squares(rows, scratch)]
