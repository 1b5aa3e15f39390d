"""``project_drift`` on the kernels: phases 1 and 2 and the sums of squares, in four or five launches a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .device import Profile, device_profile
from .launch import launch
from .layout import Group, Problem, is_transposed, lies, readable, type_name, vectors
from .schedule import Grid, Schedule, build_schedule, splits_of
from .tile_table import rank_class
from .upload import upload_fields, upload_schedule
from .variants import Access, Form, Variant, drift_variant, project_variant, reduce_variant, squares_variant


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
        found = (self.project_schedule, self.drift_schedule, self.reduce_schedule)
        return [schedule for schedule in found if schedule is not None]


def up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def access_of(profile: Profile, aligned: bool, even: bool) -> Access:
    """How a launch reads: by descriptors where the architecture has them, else without masks where tiles divide."""
    descriptor = aligned and profile.descriptors
    return Access(aligned, descriptor, aligned and even and not descriptor)


@lru_cache(maxsize=1024)
def plan_forward(
    profile: Profile, group: Group, problems: tuple[Problem, ...], has_block: bool, drift_aligned: bool
) -> ForwardPlan:
    """The launches for weights of one group (not full anchors)."""
    arch, form, rank = profile.architecture, group.form, group.rank_class

    def project_of(even: bool) -> Variant:
        return project_variant(arch, form, rank, group.rows_contiguous, access_of(profile, group.aligned, even))

    def drift_of(even: bool) -> Variant:
        access = access_of(profile, group.aligned, even)
        return drift_variant(arch, form, rank, group.transposed, access, drift_aligned, has_block)

    pm, pn, pk = project_of(False).blocks
    dm, dn, dk = drift_of(False).blocks
    # T is padded to whole tiles of both phases.
    padded = [(up(p.rows, max(pm, dk)), up(p.rank, max(pn, dn))) for p in problems]
    whole = all((p.rows, p.rank) == size for p, size in zip(problems, padded, strict=True))
    project = project_of(whole and all(p.cols % pk == 0 for p in problems))
    drift = drift_of(
        drift_aligned and all(p.rank % dm == 0 and p.rank % dn == 0 and p.rows % dk == 0 for p in problems)
    )
    planes = form.planes
    columns: dict[str, list[int]] = {name: [] for name in ("PLANES_ROW", "PLANES_ROWS", "SPLITS", "SQUARES", "SLOTS")}
    project_grids, drift_grids, reduce_grids = [], [], []
    planes_offsets, partial_offsets = [], []
    planes_size = partial_size = slots = 0
    for p, (height, width) in zip(problems, padded, strict=True):
        high, wide = -(-p.rank // dm), -(-p.rank // dn)
        splits = splits_of(p.rows, p.rank, dm, dn)
        project_grids.append(Grid(height // pm, width // pn, 1, pm * pn * up(p.cols, pk)))
        drift_grids.append(Grid(high, wide, splits, dm * dn * up(-(-p.rows // splits), dk) * planes))
        reduce_grids.append(Grid(high, wide, int(splits > 1), splits))
        for name, value in (
            ("PLANES_ROW", width),
            ("PLANES_ROWS", height),
            ("SPLITS", splits),
            ("SQUARES", slots),
            ("SLOTS", high * wide),
        ):
            columns[name].append(value)
        planes_offsets.append(planes_size)
        partial_offsets.append(partial_size)
        planes_size += planes * height * width
        partial_size += splits * high * wide * dm * dn if splits > 1 else 0
        slots += high * wide
    columns |= static_columns(problems)
    reduces = any(grid.tiles for grid in reduce_grids)
    return ForwardPlan(
        project,
        drift,
        build_schedule(tuple(project_grids), profile.multiprocessors * project.residents, False),
        build_schedule(tuple(drift_grids), profile.multiprocessors * drift.residents, False),
        build_schedule(tuple(reduce_grids), profile.multiprocessors * drift.residents, False) if reduces else None,
        columns,
        planes_offsets,
        planes_size,
        partial_offsets,
        partial_size,
        slots,
    )


def static_columns(problems: Sequence[Problem]) -> dict[str, list[int]]:
    columns = {
        "ROWS": [p.rows for p in problems],
        "COLS": [p.cols for p in problems],
        "RANK": [p.rank for p in problems],
    }
    for name in ("weight", "base", "left", "right", "grad"):
        pairs = [getattr(p, name) for p in problems]
        columns[f"{name.upper()}_ROW"] = [pair[0] for pair in pairs]
        columns[f"{name.upper()}_COL"] = [pair[1] for pair in pairs]
    return columns


def describe(
    weight: Tensor, left: Tensor, right: Tensor, base: Tensor | None, profile: Profile
) -> tuple[Group, Problem]:
    """The group that a projected weight belongs to, and its static description."""
    transposed = is_transposed(weight.shape)
    if transposed:
        left, right = right, left
    rank = left.shape[1]
    pieces = [lies(weight, transposed)]
    if base is not None:
        pieces.append(lies(base, transposed))
    bases = [lies(left, False), lies(right, False)]
    aligned = all(p.descriptor if profile.descriptors else p.pointer for p in pieces + bases)
    aligned = aligned and len({p.rows_contiguous for p in pieces}) == 1 and not any(b.rows_contiguous for b in bases)
    # C and B are read and written in vectors where all else is.
    aligned = aligned and rank % 4 == 0
    form = Form(type_name(weight.dtype), None if base is None else type_name(base.dtype), type_name(left.dtype))
    rows, cols = sorted(weight.shape)
    group = Group(form, rank_class(rank), transposed, aligned and pieces[0].rows_contiguous, aligned)
    base_strides = pieces[1].strides if base is not None else (0, 0)
    return group, Problem(rows, cols, rank, pieces[0].strides, base_strides, bases[0].strides, bases[1].strides)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in tensors]


def run_forward(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Drifts and squares of projected weights (base, block and bare forms)."""
    device = weights[0].device
    profile = device_profile(device)
    drifts = [w.new_empty((u.shape[1], u.shape[1]), dtype=torch.float32) for w, u in zip(weights, lefts, strict=True)]
    squares = weights[0].new_empty((len(weights),), dtype=torch.float32)
    blocks = [vectors(b) for b in blocks]
    if bases:
        bases = list(map(readable, weights, bases))
    groups: dict[Group, list[tuple[int, Problem]]] = {}
    for i, weight in enumerate(weights):
        group, problem = describe(weight, lefts[i], rights[i], bases[i] if bases else None, profile)
        groups.setdefault(group, []).append((i, problem))
    for group, entries in groups.items():
        members = [i for i, _ in entries]
        plan = plan_forward(profile, group, tuple(p for _, p in entries), bool(blocks), group.aligned)
        planes = torch.empty(plan.planes_size, dtype=torch.bfloat16, device=device)
        partial = torch.empty(plan.partial_size, dtype=torch.float32, device=device)
        slots = torch.empty(plan.slots, dtype=torch.float32, device=device)
        first, second = (rights, lefts) if group.transposed else (lefts, rights)
        columns = dict(plan.columns)
        columns["NUMBER"] = members
        columns["WEIGHT"] = addresses([weights[i] for i in members])
        columns["BASE"] = addresses([bases[i] for i in members]) if bases else [0] * len(members)
        columns["LEFT"] = addresses([first[i] for i in members])
        columns["RIGHT"] = addresses([second[i] for i in members])
        columns["BLOCK"] = addresses([blocks[i] for i in members]) if blocks else [0] * len(members)
        columns["DRIFT"] = addresses([drifts[i] for i in members])
        columns["PLANES"] = [planes.data_ptr() + 2 * offset for offset in plan.planes_offsets]
        columns["PARTIAL"] = [partial.data_ptr() + 4 * offset for offset in plan.partial_offsets]
        table = upload_fields(columns, len(members), device)
        project, drift = plan.project_schedule, plan.drift_schedule
        launch(plan.project, project.programs_with_work, device, table, *upload_schedule(project, device))
        launch(plan.drift, drift.programs_with_work, device, table, *upload_schedule(drift, device), slots)
        if plan.reduce_schedule is not None:
            schedule = plan.reduce_schedule
            launch(
                reduce_variant(plan.drift), schedule.programs_with_work, device, table,
                *upload_schedule(schedule, device), slots,
            )  # fmt: skip
        launch(squares_variant(), len(members), device, table, slots, squares)
    return drifts, squares
