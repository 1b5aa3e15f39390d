"""``pull_back`` on the kernels: phases 3 and 4, two launches a group, or three where C is rounded first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from ..operands import Operands
from .device import Profile, access_of
from .launch import Launch
from .layout import Facts, Problem, PullKey, is_transposed, layout_of, round_up, static_columns, type_name
from .operation import PullBackOperation, facts_of, group_by_key
from .project_drift import Projection
from .schedule import Grid, Schedule, build_schedule
from .scratch import Scratch, Sizes
from .table import Rows
from .tile_table import rank_class
from .variants import Variant, basis_parts, gradient_variant, pull_variant, round_variant


@dataclass(frozen=True, eq=False)
class BackwardPlan:
    """Everything about one group that does not change from step to step. Sizes are in elements."""

    rounding: Variant | None
    pull: Variant
    gradient: Variant
    round_schedule: Schedule | None
    pull_schedule: Schedule
    gradient_schedule: Schedule
    columns: dict[str, list[int]]
    rounded_offsets: list[int]
    planes_offsets: list[int]
    planes_size: int

    @property
    def workspace_bytes(self) -> int:
        return 2 * self.planes_size

    @property
    def schedules(self) -> list[Schedule]:
        found = (self.round_schedule, self.pull_schedule, self.gradient_schedule)
        return [schedule for schedule in found if schedule is not None]


@lru_cache(maxsize=1024)
def plan_backward(
    profile: Profile, key: PullKey, problems: tuple[Problem, ...], drift_aligned: bool, accumulate: bool
) -> BackwardPlan:
    """The launches for weights of one group (not full anchors)."""
    arch, basis, rank = profile.architecture, key.basis, key.rank_class

    def pull_of(even: bool) -> Variant:
        access = access_of(profile, key.aligned, even)
        return pull_variant(arch, basis, rank, key.transposed, access, drift_aligned=drift_aligned)

    def gradient_of(even: bool) -> Variant:
        aligned = key.aligned and key.grad_aligned
        return gradient_variant(
            architecture=arch,
            basis=basis,
            grad=key.grad,
            rank=rank,
            rows_contiguous=key.rows_contiguous,
            access=access_of(profile, aligned, even),
            grad_aligned=aligned,
            accumulate=accumulate,
        )

    pm, pn, pk = pull_of(False).blocks
    gm, gn, gk = gradient_of(False).blocks

    def extents(p: Problem) -> tuple[int, int]:
        return (p.cols, p.rows) if key.rows_contiguous else (p.rows, p.cols)

    # P is padded to whole tiles of both phases.
    side = gn if key.rows_contiguous else gm
    padded = [(round_up(p.rows, max(pm, side)), round_up(p.rank, max(pn, gk))) for p in problems]
    filled = all((p.rows, p.rank) == size for p, size in zip(problems, padded, strict=True))
    pull = pull_of(drift_aligned and filled and all(p.rank % pk == 0 for p in problems))
    whole = all(high % gm == 0 and wide % gn == 0 for high, wide in map(extents, problems))
    gradient = gradient_of(whole and key.grad_aligned and all(p.rank % gk == 0 for p in problems))
    parts = basis_parts(basis)
    pull_grids, gradient_grids, planes_offsets = [], [], []
    widths, heights = [], []
    planes_size = 0
    rounding = round_variant(pull)
    round_grids, rounded_rows, rounded_offsets = [], [], []
    for p, (height, width) in zip(problems, padded, strict=True):
        high, wide = extents(p)
        pull_grids.append(Grid(height // pm, width // pn, 1, pm * pn * round_up(p.rank, pk)))
        gradient_grids.append(Grid(-(-high // gm), -(-wide // gn), 1, gm * gn * round_up(p.rank, gk)))
        widths.append(width)
        heights.append(height)
        planes_offsets.append(planes_size)
        planes_size += parts * height * width
    for p in problems:
        # Rows and matrices of whole 16 bytes, behind the planes.
        rounded_rows.append(round_up(p.rank, 8))
        rounded_offsets.append(planes_size)
        if rounding is not None:
            planes_size += p.rank * rounded_rows[-1]
            round_grids.append(Grid(-(-(p.rank**2) // dict(rounding.constants)["BLOCK"]), 1, 1, 1))
    round_schedule = None
    if rounding is not None:
        round_schedule = build_schedule(tuple(round_grids), profile.multiprocessors * rounding.blocks_per_sm, False)
    return BackwardPlan(
        rounding=rounding,
        pull=pull,
        gradient=gradient,
        round_schedule=round_schedule,
        pull_schedule=build_schedule(tuple(pull_grids), profile.multiprocessors * pull.blocks_per_sm, False),
        gradient_schedule=build_schedule(tuple(gradient_grids), profile.multiprocessors * gradient.blocks_per_sm, True),
        columns={
            **static_columns(problems),
            "PLANES_ROW": widths,
            "PLANES_ROWS": heights,
            "ROUNDED_ROW": rounded_rows,
        },
        rounded_offsets=rounded_offsets,
        planes_offsets=planes_offsets,
        planes_size=planes_size,
    )


def describe_gradient(left: Facts, right: Facts, grad: Facts, profile: Profile) -> tuple[PullKey, Problem]:
    """The key that decides the launches of a gradient, and the gradient's static description."""
    transposed = is_transposed(grad[0])
    if transposed:
        left, right = right, left
    subspaces = [layout_of(left, False), layout_of(right, False)]
    aligned = all((s.descriptor if profile.descriptors else s.pointer) and not s.rows_contiguous for s in subspaces)
    target = layout_of(grad, transposed)
    rank = left[0][1]
    # C is read in vectors where all else is.
    aligned = aligned and rank % 4 == 0
    key = PullKey(
        basis=type_name(left[2]),
        grad=type_name(grad[2]),
        rank_class=rank_class(rank),
        transposed=transposed,
        rows_contiguous=target.rows_contiguous,
        aligned=aligned,
        grad_aligned=target.pointer,
    )
    rows, cols = sorted(grad[0])
    return key, Problem(rows, cols, rank, left=subspaces[0].strides, right=subspaces[1].strides, grad=target.strides)


class PullBack(PullBackOperation[PullKey, BackwardPlan]):
    """``grads = scale * U C V^T``, or ``+=`` with ``accumulate``, of projected weights of one batch."""

    _drifts: list[int] | tuple[Projection, list[int]]

    def stage(
        self,
        operands: Operands,
        grads: Sequence[Facts],
        addresses: list[int],
        drifts: list[int] | tuple[Projection, list[int]],
        scales: Sequence[float] | None,
    ) -> None:
        """See :meth:`PullBackOperation.stage`.

        Args:
            drifts: addresses of C (k, k) in float32; or a projection that leaves them in the scratch memory, with the
                gradients' places in its batch.
        """
        super().stage(operands, grads, addresses, drifts, scales)
        self._drifts = drifts

    def expects(self, operands: Operands, grads: Sequence[Facts]) -> bool:
        return grads == self._facts

    def place_operands(self, operands: Operands, grads: Sequence[Facts]) -> None:
        alike = self.is_alike(grads)
        if alike and not self._casts:
            return
        cast = operands.cast_subspaces()
        lefts, rights = cast.lefts, cast.rights
        self.hold_casts((*lefts, *rights), (*operands.lefts, *operands.rights))
        if not alike:
            self._plan(lefts, rights, grads)
        transposed = {i: group.key.transposed for group, _ in self._groups for i in group.members}
        turned = [(v, u) if transposed[i] else (u, v) for i, (u, v) in enumerate(zip(lefts, rights, strict=True))]
        self.set_column("LEFT", [left.data_ptr() for left, _ in turned])
        self.set_column("RIGHT", [right.data_ptr() for _, right in turned])

    def place_drifts(self) -> None:
        if isinstance(self._drifts, tuple):
            projection, members = self._drifts
            self.set_column("DRIFT", [projection.scratch_drifts[i] for i in members])
        else:
            self.set_column("DRIFT", self._drifts)

    def _plan(self, lefts: Sequence[Tensor], rights: Sequence[Tensor], grads: Sequence[Facts]) -> None:
        facts = zip(facts_of(lefts), facts_of(rights), grads, strict=True)
        groups = group_by_key([describe_gradient(*each, self.profile) for each in facts])
        self._groups = [
            (group, plan_backward(self.profile, group.key, group.problems, group.key.aligned, self._accumulate))
            for group in groups
        ]
        self.assign_rows(groups)
        self.sizes = Sizes(planes=max(plan.planes_size for _, plan in self._groups))

    def launches_of(self, plan: BackwardPlan, rows: Rows, scratch: Scratch) -> list[Launch]:
        planes = scratch.planes.data_ptr()
        rows.write("PLANES", [planes + 2 * offset for offset in plan.planes_offsets])
        rows.write("ROUNDED", [planes + 2 * offset for offset in plan.rounded_offsets])
        launches = [
            self.prepare_launch(plan.pull, plan.pull_schedule, rows, self._scale_memory),
            self.prepare_launch(plan.gradient, plan.gradient_schedule, rows),
        ]
        if plan.rounding is not None and plan.round_schedule is not None:
            launches.insert(0, self.prepare_launch(plan.rounding, plan.round_schedule, rows))
        return launches
