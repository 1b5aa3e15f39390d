"""Full anchors on the kernels: ``||W - W0||_F^2`` and its gradient, grouped like the rest."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .device import device_profile
from .launch import launch
from .layout import Problem, lies, readable, type_name
from .project_drift import addresses, static_columns
from .schedule import Grid, Schedule, build_schedule
from .upload import upload_fields, upload_fields_and_scales, upload_schedule
from .variants import TypeName, Variant, full_drift_variant, full_gradient_variant, squares_variant


class WholeGroup(NamedTuple):
    """What full anchors must share for one launch; ``flipped``: seen transposed, so that rows are contiguous."""

    weight: TypeName
    base: TypeName
    grad: TypeName | None
    flipped: bool
    aligned: bool


def _describe(weight: Tensor, base: Tensor, grad: Tensor | None) -> tuple[WholeGroup, Problem]:
    flipped = lies(weight, False).rows_contiguous
    pieces = [lies(piece, flipped) for piece in (weight, base) + (() if grad is None else (grad,))]
    rows, cols = (weight.shape[1], weight.shape[0]) if flipped else (weight.shape[0], weight.shape[1])
    aligned = cols % 8 == 0 and all(p.pointer and not p.rows_contiguous for p in pieces)
    types = type_name(weight.dtype), type_name(base.dtype), None if grad is None else type_name(grad.dtype)
    group = WholeGroup(*types, flipped, aligned)
    grad_strides = (0, 0) if grad is None else pieces[2].strides
    return group, Problem(rows, cols, 0, pieces[0].strides, pieces[1].strides, grad=grad_strides)


@lru_cache(maxsize=1024)
def plan_whole(variant: Variant, problems: tuple[Problem, ...], multiprocessors: int) -> Schedule:
    """The schedule of an elementwise launch."""
    m, n, _ = variant.blocks
    grids = tuple(Grid(-(-p.rows // m), -(-p.cols // n), 1, m * n) for p in problems)
    return build_schedule(grids, multiprocessors * variant.residents, False)


def _groups(
    weights: Sequence[Tensor], bases: Sequence[Tensor], grads: Sequence[Tensor] | None
) -> dict[WholeGroup, list[tuple[int, Problem]]]:
    groups: dict[WholeGroup, list[tuple[int, Problem]]] = {}
    for i, (weight, base) in enumerate(zip(weights, bases, strict=True)):
        group, problem = _describe(weight, base, None if grads is None else grads[i])
        groups.setdefault(group, []).append((i, problem))
    return groups


def run_whole_forward(weights: Sequence[Tensor], bases: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Empty drifts and the squares ``||W - W0||_F^2`` of full anchors."""
    device = weights[0].device
    profile = device_profile(device)
    squares = weights[0].new_empty((len(weights),), dtype=torch.float32)
    bases = list(map(readable, weights, bases))
    for group, entries in _groups(weights, bases, None).items():
        members, problems = [i for i, _ in entries], tuple(p for _, p in entries)
        variant = full_drift_variant(profile.architecture, group.weight, group.base, group.aligned)
        schedule = plan_whole(variant, problems, profile.multiprocessors)
        m, n, _ = variant.blocks
        tiles = [-(-p.rows // m) * -(-p.cols // n) for p in problems]
        slots = torch.empty(sum(tiles), dtype=torch.float32, device=device)
        columns = static_columns(problems) | {
            "NUMBER": members,
            "WEIGHT": addresses([weights[i] for i in members]),
            "BASE": addresses([bases[i] for i in members]),
            "SQUARES": [sum(tiles[:i]) for i in range(len(tiles))],
            "SLOTS": tiles,
        }
        table = upload_fields(columns, len(members), device)
        launch(variant, schedule.programs_with_work, device, table, *upload_schedule(schedule, device), slots)
        launch(squares_variant(), len(members), device, table, slots, squares)
    return [w.new_empty((0, 0), dtype=torch.float32) for w in weights], squares


def run_whole_backward(
    grads: Sequence[Tensor], weights: Sequence[Tensor], bases: Sequence[Tensor], scales: Tensor, accumulate: bool
) -> None:
    """``grads = scale * (W - W0)``, or ``+=``."""
    device = grads[0].device
    profile = device_profile(device)
    bases = list(map(readable, weights, bases))
    for group, entries in _groups(weights, bases, grads).items():
        members, problems = [i for i, _ in entries], tuple(p for _, p in entries)
        assert group.grad is not None
        variant = full_gradient_variant(
            profile.architecture, group.weight, group.base, group.grad, group.aligned, accumulate
        )
        schedule = plan_whole(variant, problems, profile.multiprocessors)
        columns = static_columns(problems) | {
            "NUMBER": members,
            "WEIGHT": addresses([weights[i] for i in members]),
            "BASE": addresses([bases[i] for i in members]),
            "GRAD": addresses([grads[i] for i in members]),
        }
        table, factors = upload_fields_and_scales(columns, len(members), scales, device)
        launch(variant, schedule.programs_with_work, device, table, *upload_schedule(schedule, device), factors)
