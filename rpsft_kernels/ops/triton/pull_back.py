"""``pull_back`` on the kernels: phases 3 and 4, two launches a group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..operands import Operands
from .device import Profile, access_of
from .launch import Launch
from .layout import Facts, Problem, PullKey, is_transposed, layout_of, static_columns, type_name, up
from .operation import LaunchGroup, Operation, facts_of, group_by_key
from .project_drift import Projection
from .schedule import Grid, Schedule, build_schedule
from .scratch import Scratch, Sizes
from .table import SCALE, Rows, float_bits, place_scales
from .tile_table import rank_class
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
    profile: Profile, group: PullKey, problems: tuple[Problem, ...], drift_aligned: bool, accumulate: bool
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
        build_schedule(tuple(pull_grids), profile.multiprocessors * pull.blocks_per_sm, False),
        build_schedule(tuple(gradient_grids), profile.multiprocessors * gradient.blocks_per_sm, True),
        {**static_columns(problems), "PLANES_ROW": widths, "PLANES_ROWS": heights},
        planes_offsets,
        planes_size,
    )


def describe(left: Facts, right: Facts, grad: Facts, profile: Profile) -> tuple[PullKey, Problem]:
    """What decides the launches of a gradient, and its static description."""
    transposed = is_transposed(grad[0])
    if transposed:
        left, right = right, left
    subspaces = [layout_of(left, False), layout_of(right, False)]
    aligned = all((s.descriptor if profile.descriptors else s.pointer) and not s.rows_contiguous for s in subspaces)
    place = layout_of(grad, transposed)
    rank = left[0][1]
    # C is read in vectors where all else is.
    aligned = aligned and rank % 4 == 0
    rows, cols = sorted(grad[0])
    key = PullKey(
        type_name(left[2]),
        type_name(grad[2]),
        rank_class(rank),
        transposed,
        place.rows_contiguous,
        aligned,
        place.pointer,
    )
    return key, Problem(rows, cols, rank, left=subspaces[0].strides, right=subspaces[1].strides, grad=place.strides)


class PullBack(Operation[PullKey]):
    """``grads = scale * U C V^T``, or ``+=`` with ``accumulate``, of projected weights of one batch."""

    _groups: list[tuple[LaunchGroup[PullKey], BackwardPlan]]

    def __init__(
        self, rows: Rows, device: torch.device, profile: Profile, accumulate: bool, scales: Tensor | None
    ) -> None:
        super().__init__(rows, device, profile)
        self._accumulate, self._scales = accumulate, scales
        self._drifts: list[int] | tuple[Projection, list[int]] = []

    def stage(
        self,
        operands: Operands,
        grads: Sequence[Facts],
        addresses: list[int],
        drifts: list[int] | tuple[Projection, list[int]],
        scales: Sequence[float] | None,
    ) -> None:
        """Take the gradients of a call, where C (k, k) lie, and the scales where these travel with the table.

        Args:
            drifts: addresses of C in float32; or a projection that leaves them in the scratch memory, with the
                gradients' places in its batch.
        """
        alike = self.is_alike(grads)
        if not alike or self._casts:
            cast = operands.cast_subspaces()
            lefts, rights = cast.lefts, cast.rights
            self.hold_casts((*lefts, *rights), (*operands.lefts, *operands.rights))
            if not alike:
                self._plan(lefts, rights, grads)
            transposed = {i: group.key.transposed for group, _ in self._groups for i in group.members}
            turned = [(v, u) if transposed[i] else (u, v) for i, (u, v) in enumerate(zip(lefts, rights, strict=True))]
            self.move("LEFT", [left.data_ptr() for left, _ in turned])
            self.move("RIGHT", [right.data_ptr() for _, right in turned])
        self.move("GRAD", addresses)
        self._drifts = drifts
        if scales is not None and scales != self._numbers:
            self._numbers = list(scales)
            self.move(SCALE, float_bits(scales))

    def expects(self, operands: Operands, grads: Sequence[Facts]) -> bool:
        """Whether it is prepared for gradients that lie like these."""
        return grads == self._facts

    def place_drifts(self) -> None:
        if isinstance(self._drifts, tuple):
            projection, members = self._drifts
            self.move("DRIFT", [projection.scratch_drifts[i] for i in members])
        else:
            self.move("DRIFT", self._drifts)

    def _plan(self, lefts: Sequence[Tensor], rights: Sequence[Tensor], grads: Sequence[Facts]) -> None:
        facts = zip(facts_of(lefts), facts_of(rights), grads, strict=True)
        groups = group_by_key([describe(*each, self.profile) for each in facts])
        self._groups = [
            (group, plan_backward(self.profile, group.key, group.problems, group.key.aligned, self._accumulate))
            for group in groups
        ]
        self.order(groups)
        self.sizes = Sizes(planes=max(plan.planes_size for _, plan in self._groups))

    def launches(self, scratch: Scratch) -> list[Launch]:
        scales = place_scales(self.rows, self._order, self._scales)
        found, begin = [], 0
        for group, plan in self._groups:
            rows = self.rows.part(begin, len(group.members))
            begin += len(group.members)
            for name, values in plan.columns.items():
                rows.write(name, values)
            rows.write("PLANES", [scratch.planes.data_ptr() + 2 * offset for offset in plan.planes_offsets])
            found.append(self.scheduled(plan.pull, plan.pull_schedule, rows, scales))
            found.append(self.scheduled(plan.gradient, plan.gradient_schedule, rows))
        return found
