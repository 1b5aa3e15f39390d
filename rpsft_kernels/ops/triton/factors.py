"""Products of low-rank factors with bases on the kernels: ``T = F V`` and ``G += X V^T``, one launch a group.

A factor F (r, n) has few rows. It is a weight without W0 to the project kernels, and its gradient one of P = X to the
gradient kernels, so that factors need no kernels of their own. Both are bound by memory: they read V once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ...costs import stretches_of
from .device import Profile, access_of
from .launch import Launch
from .layout import Facts, Problem, ProjectKey, PullKey, addresses_of, layout_of, round_up, static_columns, type_name
from .operation import Operation, facts_of, group_by_key
from .schedule import Grid, Schedule, build_schedule
from .scratch import Scratch, Sizes
from .table import Rows
from .tile_table import rank_class
from .variants import SPECIALISED, Precision, Variant, basis_parts, gradient_variant, project_variant

# bfloat16 parts that hold every number of a dtype.
_PARTS = {torch.float16: 2, torch.float32: 3}


class ImageKey(NamedTuple):
    """The properties that factors must share to be projected by one launch. ``stretches``: see ``fields``."""

    project: ProjectKey
    stretches: int


@dataclass(frozen=True, eq=False)
class FactorPlan:
    """One launch over one group of factors.

    A factor has ``parts`` planes (height, width) of bfloat16 parts, for each of its ``stretches``.
    """

    variant: Variant
    schedule: Schedule
    columns: dict[str, list[int]]
    stretches: int
    parts: int
    height: int
    width: int

    def view(self, planes: Tensor, count: int) -> Tensor:
        """The planes of ``count`` factors: (count, stretches, parts, height, width)."""
        return planes.view(count, self.stretches, self.parts, self.height, self.width)

    @property
    def planes_size(self) -> int:
        """Elements of one factor's planes."""
        return self.stretches * self.parts * self.height * self.width


@lru_cache(maxsize=256)
def plan_images(profile: Profile, key: ImageKey, problems: tuple[Problem, ...]) -> FactorPlan:
    """The launch that projects the factors of a group."""
    precision, k = key.project.precision, key.project.rank_class

    def variant_of(even: bool) -> Variant:
        access = access_of(profile, key.project.aligned, even)
        return project_variant(profile.architecture, precision, k, key.project.rows_contiguous, access)

    pm, pn, pk = variant_of(False).blocks
    rows, rank = problems[0].rows, problems[0].rank
    height, width = round_up(rows, pm), round_up(rank, pn)
    variant = variant_of((height, width) == (rows, rank) and all(p.cols % pk == 0 for p in problems))
    grids = tuple(
        Grid(height // pm, width // pn, key.stretches, pm * pn * round_up(-(-p.cols // key.stretches), pk))
        for p in problems
    )
    count = len(problems)
    return FactorPlan(
        variant=variant,
        schedule=build_schedule(grids, profile.multiprocessors * variant.blocks_per_sm, False),
        columns={
            **static_columns(problems),
            "PLANES_ROW": [width] * count,
            "PLANES_ROWS": [height] * count,
            "STRETCHES": [key.stretches] * count,
        },
        stretches=key.stretches,
        parts=precision.planes,
        height=height,
        width=width,
    )


@lru_cache(maxsize=256)
def plan_gradients(profile: Profile, key: PullKey, problems: tuple[Problem, ...]) -> FactorPlan:
    """The launch that adds to the gradients of a group of factors."""

    def variant_of(even: bool) -> Variant:
        aligned = key.aligned and key.grad_aligned
        return gradient_variant(
            architecture=profile.architecture,
            basis=key.basis,
            grad=key.grad,
            rank=key.rank_class,
            rows_contiguous=key.rows_contiguous,
            access=access_of(profile, aligned, even),
            grad_aligned=aligned,
            accumulate=True,
        )

    gm, gn, gk = variant_of(False).blocks

    def extents(p: Problem) -> tuple[int, int]:
        return (p.cols, p.rows) if key.rows_contiguous else (p.rows, p.cols)

    rows, rank = problems[0].rows, problems[0].rank
    height, width = round_up(rows, gn if key.rows_contiguous else gm), round_up(rank, gk)
    whole = rank % gk == 0 and all(high % gm == 0 and wide % gn == 0 for high, wide in map(extents, problems))
    variant = variant_of(whole and key.grad_aligned)
    grids = tuple(Grid(-(-high // gm), -(-wide // gn), 1, gm * gn * width) for high, wide in map(extents, problems))
    count = len(problems)
    return FactorPlan(
        variant=variant,
        schedule=build_schedule(grids, profile.multiprocessors * variant.blocks_per_sm, True),
        columns={**static_columns(problems), "PLANES_ROW": [width] * count, "PLANES_ROWS": [height] * count},
        stretches=1,
        parts=basis_parts(key.basis),
        height=height,
        width=width,
    )


def describe_image(factor: Facts, basis: Facts, profile: Profile) -> tuple[ImageKey, Problem]:
    """The key that decides the launch of a factor's projection, and the factor's static description."""
    layouts = layout_of(factor, False), layout_of(basis, False)
    aligned = all(each.descriptor if profile.descriptors else each.pointer for each in layouts)
    aligned = aligned and not layouts[1].rows_contiguous
    (rows, cols), rank = factor[0], basis[0][1]
    project = ProjectKey(
        precision=Precision(type_name(factor[2]), None, type_name(basis[2])),
        rank_class=rank_class(rank),
        transposed=False,
        rows_contiguous=aligned and layouts[0].rows_contiguous,
        aligned=aligned,
    )
    access = access_of(profile, aligned, False)
    variant = project_variant(
        profile.architecture, project.precision, project.rank_class, project.rows_contiguous, access
    )
    # Only the warp-specialised kernel cuts its sums.
    stretches = stretches_of(cols) if variant.kernel in SPECIALISED else 1
    problem = Problem(rows, cols, rank, weight=layouts[0].strides, right=layouts[1].strides)
    return ImageKey(project, stretches), problem


def describe_addition(grad: Facts, basis: Facts, profile: Profile) -> tuple[PullKey, Problem]:
    """The key that decides the launch that adds to a factor's gradient, and the gradient's static description."""
    target, right = layout_of(grad, False), layout_of(basis, False)
    aligned = (right.descriptor if profile.descriptors else right.pointer) and not right.rows_contiguous
    rank = basis[0][1]
    key = PullKey(
        basis=type_name(basis[2]),
        grad=type_name(grad[2]),
        rank_class=rank_class(rank),
        transposed=False,
        rows_contiguous=target.rows_contiguous,
        aligned=aligned,
        grad_aligned=target.pointer,
    )
    rows, cols = grad[0]
    return key, Problem(rows, cols, rank, right=right.strides, grad=target.strides)


def split_factors(factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return factors (r, n) as their bfloat16 parts below each other, (parts * r, n), equally many for all.

    A tile has rows to spare for the parts of a factor, so that V is multiplied, and read, only once.
    """
    parts = max(_PARTS.get(factor.dtype, 1) for factor in factors)
    if parts == 1:
        return factors
    alike: dict[tuple[torch.Size, bool, torch.dtype], list[int]] = {}
    for i, factor in enumerate(factors):
        alike.setdefault((factor.shape, factor.stride(0) < factor.stride(1), factor.dtype), []).append(i)
    split: list[Tensor] = list(factors)
    for (shape, transposed, _), members in alike.items():
        r, n = shape
        stacked = torch.stack([factors[i].T if transposed else factors[i] for i in members])
        # Rows of whole 16 bytes.
        width = round_up(parts * r, 8) if transposed else round_up(n, 8)
        rows = stacked.new_zeros((len(members), n if transposed else parts * r, width), dtype=torch.bfloat16)
        for part in range(parts):
            own = slice(part * r, (part + 1) * r)
            target = rows[:, :, own] if transposed else rows[:, own, :n]
            target.copy_(stacked)
            if part + 1 < parts:
                stacked = stacked.float() - target
        for i, matrix in zip(members, rows, strict=True):
            split[i] = matrix[:, : parts * r].T if transposed else matrix[:, :n]
    return split


class FactorImages(Operation[ImageKey, FactorPlan]):
    """``T = F V`` of one batch of factors (r, n), all of one r, with bases (n, k), all of one k."""

    def stage(self, factors: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
        """Take the factors of a call, in any dtypes; bases in bfloat16 take them in bfloat16 parts."""
        self._rows = factors[0].shape[0]
        if all(basis.dtype == torch.bfloat16 for basis in bases):
            split = split_factors(factors)
            self.hold_casts(split, factors)
            factors = split
        facts, basis_facts = facts_of(factors), facts_of(bases)
        if not self.is_alike([*facts, *basis_facts]):
            described = [describe_image(*each, self.profile) for each in zip(facts, basis_facts, strict=True)]
            groups = group_by_key(described)
            self._groups = [(group, plan_images(self.profile, group.key, group.problems)) for group in groups]
            self.assign_rows(groups)
            self._extents = factors[0].shape[0], bases[0].shape[1]
            self.sizes = Sizes(planes=sum(len(group.members) * plan.planes_size for group, plan in self._groups))
        self.set_column("WEIGHT", addresses_of(factors))
        self.set_column("RIGHT", addresses_of(bases))

    def place(self, scratch: Scratch) -> None:
        """The planes are written with the launches."""

    def launches_of(self, plan: FactorPlan, rows: Rows, scratch: Scratch) -> list[Launch]:
        rows.write("PLANES", [planes.data_ptr() for planes in self._planes_of(plan, scratch)])
        return [self.prepare_launch(plan.variant, plan.schedule, rows)]

    def _planes_of(self, plan: FactorPlan, scratch: Scratch) -> Tensor:
        begin = 0
        for group, other in self._groups:
            size = len(group.members) * other.planes_size
            if other is plan:
                break
            begin += size
        return plan.view(scratch.planes[begin : begin + size], len(group.members))

    def images(self, scratch: Scratch) -> Tensor:
        """T (count, r, k) in float32. Call it when the launches are queued, before others write the scratch memory."""
        r, k = self._extents
        images: list[Tensor] = []
        for _, plan in self._groups:
            planes = self._planes_of(plan, scratch)
            # The smallest part first, so that the parts of a stretch make up its sum exactly.
            stretches = planes[:, :, -1, :r, :k].float()
            for part in range(plan.parts - 2, -1, -1):
                stretches += planes[:, :, part, :r, :k]
            images.append(stretches.sum(1))
        joined = images[0]
        if len(images) > 1:
            joined = joined.new_empty((self.rows.count, r, k))
            for (group, _), image in zip(self._groups, images, strict=True):
                joined[group.members] = image
        if r == self._rows:
            return joined
        split = joined.view(self.rows.count, -1, self._rows, k)
        total = split[:, -1].clone()
        for part in range(split.shape[1] - 2, -1, -1):
            total += split[:, part]
        return total


class FactorGradients(Operation[PullKey, FactorPlan]):
    """``G += X V^T`` of one batch of factors' gradients (r, n), all of one r, with bases (n, k), all of one k."""

    def stage(self, grads: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
        facts, basis_facts = facts_of(grads), facts_of(bases)
        if not self.is_alike([*facts, *basis_facts]):
            described = [describe_addition(*each, self.profile) for each in zip(facts, basis_facts, strict=True)]
            groups = group_by_key(described)
            self._groups = [(group, plan_gradients(self.profile, group.key, group.problems)) for group in groups]
            self.assign_rows(groups)
            # What is beyond r and k stays zero.
            with torch.inference_mode(False):
                self._planes = [
                    plan.view(
                        torch.zeros(len(group.members) * plan.planes_size, dtype=torch.bfloat16, device=self.device),
                        len(group.members),
                    )
                    for group, plan in self._groups
                ]
        self.set_column("GRAD", addresses_of(grads))
        self.set_column("RIGHT", addresses_of(bases))

    def place(self, scratch: Scratch) -> None:
        """Nothing depends on the scratch memory."""

    def launches_of(self, plan: FactorPlan, rows: Rows, scratch: Scratch) -> list[Launch]:
        place = next(i for i, (_, own) in enumerate(self._groups) if own is plan)
        rows.write("PLANES", [planes.data_ptr() for planes in self._planes[place]])
        return [self.prepare_launch(plan.variant, plan.schedule, rows)]

    def write(self, coefficients: Tensor) -> None:
        """Take X (count, r, k), in float32, in the bfloat16 parts that the kernels read."""
        _, r, k = coefficients.shape
        for (group, plan), planes in zip(self._groups, self._planes, strict=True):
            rest = coefficients if len(self._groups) == 1 else coefficients[group.members]
            for part in range(plan.parts):
                target = planes[:, 0, part, :r, :k]
                target.copy_(rest)
                if part + 1 < plan.parts:
                    rest = rest - target
