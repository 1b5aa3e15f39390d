"""``pull_back`` on the kernels: phases 3 and 4, two launches a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .device import Profile, device_profile
from .launch import launch
from .layout import Problem, PullGroup, is_transposed, lies, type_name, vectors
from .project_drift import access_of, addresses, static_columns, up
from .schedule import Grid, Schedule, build_schedule
from .tile_table import rank_class
from .upload import upload_fields_and_scales, upload_schedule
from .variants import Variant, basis_parts, gradient_variant, pull_variant


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """Everything about one group that does not change from step to step. Sizes are in elements."""

    pull: Variant
    gradient: Variant
    pull_schedule: Schedule
    gradient_schedule: Schedule
    columns: dict[str, list[int]]
    planes_offsets: list[int]
    planes_size: int

    @property
    def workspace_bytes(self) -> int:
        return 2 * self.planes_size

    @property
    def schedules(self) -> list[Schedule]:
        return [self.pull_schedule, self.gradient_schedule]


@lru_cache(maxsize=1024)
def plan_backward(
    profile: Profile, group: PullGroup, problems: tuple[Problem, ...], drift_aligned: bool, accumulate: bool
) -> BackwardPlan:
    """The launches for weights of one group (not full anchors)."""
    arch, basis, rank = profile.architecture, group.basis, group.rank_class

    def pull_of(even: bool) -> Variant:
        access = access_of(profile, group.aligned, even)
        return pull_variant(arch, basis, rank, group.transposed, access, drift_aligned)

    def gradient_of(even: bool) -> Variant:
        aligned = group.aligned and group.grad_aligned
        access = access_of(profile, aligned, even)
        return gradient_variant(arch, basis, group.grad, rank, group.rows_contiguous, access, aligned, accumulate)

    pm, pn, pk = pull_of(False).blocks
    gm, gn, gk = gradient_of(False).blocks

    def extents(p: Problem) -> tuple[int, int]:
        return (p.cols, p.rows) if group.rows_contiguous else (p.rows, p.cols)

    # P is padded to whole tiles of both phases.
    side = gn if group.rows_contiguous else gm
    padded = [(up(p.rows, max(pm, side)), up(p.rank, max(pn, gk))) for p in problems]
    filled = all((p.rows, p.rank) == size for p, size in zip(problems, padded, strict=True))
    pull = pull_of(drift_aligned and filled and all(p.rank % pk == 0 for p in problems))
    whole = all(high % gm == 0 and wide % gn == 0 for high, wide in map(extents, problems))
    gradient = gradient_of(whole and group.grad_aligned and all(p.rank % gk == 0 for p in problems))
    parts = basis_parts(basis)
    pull_grids, gradient_grids, planes_offsets = [], [], []
    widths, heights = [], []
    planes_size = 0
    for p, (height, width) in zip(problems, padded, strict=True):
        high, wide = extents(p)
        pull_grids.append(Grid(height // pm, width // pn, 1, pm * pn * up(p.rank, pk)))
        gradient_grids.append(Grid(-(-high // gm), -(-wide // gn), 1, gm * gn * up(p.rank, gk)))
        widths.append(width)
        heights.append(height)
        planes_offsets.append(planes_size)
        planes_size += parts * height * width
    return BackwardPlan(
        pull,
        gradient,
        build_schedule(tuple(pull_grids), profile.multiprocessors * pull.residents, False),
        build_schedule(tuple(gradient_grids), profile.multiprocessors * gradient.residents, True),
        {**static_columns(problems), "PLANES_ROW": widths, "PLANES_ROWS": heights},
        planes_offsets,
        planes_size,
    )


def describe(left: Tensor, right: Tensor, grad: Tensor, profile: Profile) -> tuple[PullGroup, Problem]:
    """The group that a gradient belongs to, and its static description."""
    transposed = is_transposed(grad.shape)
    if transposed:
        left, right = right, left
    bases = [lies(left, False), lies(right, False)]
    aligned = all((b.descriptor if profile.descriptors else b.pointer) and not b.rows_contiguous for b in bases)
    place = lies(grad, transposed)
    rank = left.shape[1]
    # C is read in vectors where all else is.
    aligned = aligned and rank % 4 == 0
    rows, cols = sorted(grad.shape)
    group = PullGroup(
        type_name(left.dtype),
        type_name(grad.dtype),
        rank_class(rank),
        transposed,
        place.rows_contiguous,
        aligned,
        place.pointer,
    )
    return group, Problem(rows, cols, rank, left=bases[0].strides, right=bases[1].strides, grad=place.strides)


def run_backward(
    grads: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
) -> None:
    """``grads = scale * U C V^T``, or ``+=``."""
    device = grads[0].device
    profile = device_profile(device)
    drifts = [vectors(c) for c in drifts]
    groups: dict[PullGroup, list[tuple[int, Problem]]] = {}
    for i, grad in enumerate(grads):
        group, problem = describe(lefts[i], rights[i], grad, profile)
        groups.setdefault(group, []).append((i, problem))
    for group, entries in groups.items():
        members = [i for i, _ in entries]
        plan = plan_backward(profile, group, tuple(p for _, p in entries), group.aligned, accumulate)
        planes = torch.empty(plan.planes_size, dtype=torch.bfloat16, device=device)
        first, second = (rights, lefts) if group.transposed else (lefts, rights)
        columns = dict(plan.columns)
        columns["NUMBER"] = members
        columns["LEFT"] = addresses([first[i] for i in members])
        columns["RIGHT"] = addresses([second[i] for i in members])
        columns["DRIFT"] = addresses([drifts[i] for i in members])
        columns["GRAD"] = addresses([grads[i] for i in members])
        columns["PLANES"] = [planes.data_ptr() + 2 * offset for offset in plan.planes_offsets]
        table, factors = upload_fields_and_scales(columns, len(members), scales, device)
        pull, gradient = plan.pull_schedule, plan.gradient_schedule
        launch(plan.pull, pull.programs_with_work, device, table, *upload_schedule(pull, device), factors)
        launch(plan.gradient, gradient.programs_with_work, device, table, *upload_schedule(gradient, device))
