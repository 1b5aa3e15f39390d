"""Reports a model's launches, workspace and idle multiprocessors from the plans that the launcher follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..costs import is_full
from ..ops.buckets import BucketLimits, WeightSpec, plan_buckets
from ..ops.triton.aot.targets import DESCRIPTORS
from ..ops.triton.device import Profile
from ..ops.triton.layout import Problem, ProjectKey, PullKey, type_name
from ..ops.triton.project_drift import plan_forward
from ..ops.triton.pull_back import plan_backward
from ..ops.triton.schedule import Schedule
from ..ops.triton.tile_table import rank_class
from ..ops.triton.variants import Precision


@dataclass(frozen=True)
class ScheduleReport:
    """One evaluation of the penalty and its gradient.

    Attributes:
        buckets: number of buckets that the weights form.
        launches: kernel launches a step: forward and gradient of every bucket.
        workspace_bytes: the most that one bucket's intermediates take.
        filled: share of multiprocessor time that the static schedule fills, by the tiles' multiply-adds; a tile's
            other costs (filling its pipeline, storing its result) do not count.
        filled_by_phase: the same for each phase.
    """

    buckets: int
    launches: int
    workspace_bytes: int
    filled: float
    filled_by_phase: dict[str, float]


def schedule_report(
    shapes: Sequence[tuple[int, int]],
    rank: int,
    multiprocessors: int = 132,
    architecture: str = "sm_90",
    weight_dtype: torch.dtype = torch.bfloat16,
    keep_base: bool = True,
    limits: BucketLimits | None = None,
) -> ScheduleReport:
    """Report the static schedule for aligned, contiguous weights of the given shapes; no GPU is needed.

    Args:
        shapes: (m, n) of every anchored weight, each with min(m, n) > rank (full anchors need no tiles).
        rank: k.
        multiprocessors: the GPU's number of them (132 on an H100 or H200).
        architecture: a shipped tile table, such as ``"sm_90"``.
        weight_dtype: dtype of weights and gradients.
        keep_base: base form (True) or block form.
        limits: limits of one bucket; None for the defaults.

    Raises:
        ValueError: a shape whose shorter side does not exceed the rank.
    """
    for shape in shapes:
        if is_full(shape, rank):
            raise ValueError(
                f"shapes: got {shape} at rank {rank}, expected min(m, n) > rank: such weights get full anchors, "
                "which this report leaves out"
            )
    profile = Profile(architecture, multiprocessors, DESCRIPTORS[architecture])
    dtype = type_name(weight_dtype)
    precision = Precision(dtype, "bf16" if keep_base else None, "bf16")
    buckets = plan_buckets([WeightSpec(m, n, rank, parts=precision.planes) for m, n in shapes], limits)
    busy: dict[str, float] = {}
    spent: dict[str, float] = {}
    launches = workspace = 0
    for bucket in buckets:
        transposed = shapes[bucket[0]][0] > shapes[bucket[0]][1]
        project_key = ProjectKey(precision, rank_class(rank), transposed, transposed, True)
        pull_key = PullKey(precision.basis, dtype, rank_class(rank), transposed, transposed, True, True)
        problems = tuple(contiguous_problem(*shapes[i], rank) for i in bucket)
        forward = plan_forward(profile, project_key, problems, not keep_base, rank % 4 == 0)
        backward = plan_backward(profile, pull_key, problems, rank % 4 == 0, True)
        # One more launch sums the squares, which are a few hundred numbers.
        launches += len(forward.schedules) + 1 + len(backward.schedules)
        workspace = max(workspace, forward.workspace_bytes, backward.workspace_bytes)
        phases: list[tuple[str, Schedule, int]] = [
            ("project", forward.project_schedule, forward.project.blocks_per_sm),
            ("drift", forward.drift_schedule, forward.drift.blocks_per_sm),
            ("pull", backward.pull_schedule, backward.pull.blocks_per_sm),
            ("gradient", backward.gradient_schedule, backward.gradient.blocks_per_sm),
        ]
        for name, schedule, blocks in phases:
            busy[name] = busy.get(name, 0.0) + schedule.total_cost
            spent[name] = spent.get(name, 0.0) + schedule.longest_cost * multiprocessors * blocks
    return ScheduleReport(
        buckets=len(buckets),
        launches=launches,
        workspace_bytes=workspace,
        filled=sum(busy.values()) / sum(spent.values()),
        filled_by_phase={name: busy[name] / spent[name] for name in busy},
    )


def contiguous_problem(m: int, n: int, rank: int) -> Problem:
    """A contiguous weight (m, n) with contiguous bases, as launches see it."""
    rows, cols = sorted((m, n))
    strides = (1, n) if m > n else (n, 1)
    return Problem(rows, cols, rank, strides, strides, (rank, 1), (rank, 1), strides)
