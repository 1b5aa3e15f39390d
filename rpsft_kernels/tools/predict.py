"""Predicts the time of a step on an H200, phase by phase, from the launcher's own plans and rates that were measured.

``roofline`` knows data sheets, this knows tiles. A phase lasts as long as the program with the most to do, at the rate
of one multiprocessor on tiles of that kernel; no shorter than DRAM needs for all that the phase moves, nor than the way
from the second-level cache needs for what that program reads. Phases follow one another. Nothing is timed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import NamedTuple

from ..costs import is_full
from ..distributed.shard import Shard
from ..ops.buckets import BucketLimits, WeightSpec, plan_buckets
from ..ops.triton.aot.targets import DESCRIPTORS
from ..ops.triton.device import Profile
from ..ops.triton.layout import ProjectKey, PullKey
from ..ops.triton.project_drift import plan_forward
from ..ops.triton.pull_back import plan_backward
from ..ops.triton.schedule import Schedule
from ..ops.triton.tile_table import rank_class
from ..ops.triton.variants import Variant
from .roofline import LAUNCH_SECONDS, Job, rank_phases
from .schedule import contiguous_problem

# FLOP/s of an H200 (torch 2.11, 2026-11-26) if all multiprocessors always had a tile. The plain kernels' were measured,
# but for drift's, which is an estimate from its counters. Of the warp-specialised ones, prototypes of project
# (128 x 256) and of gradient were; pull is taken to multiply like project: it differs in that both operands come from
# shared memory.
TENSOR_RATES = {
    "project": 535e12,
    "drift": 550e12,
    "pull": 275e12,
    "gradient": 487e12,
    "hopper_project": 769e12,
    "hopper_pull": 769e12,
    "hopper_gradient": 594e12,
}
# Bytes/s of a copy in DRAM, the share of it that kernels are taken to reach, and bytes/s from the second-level cache
# into all multiprocessors, as the prototype that read most took them (project, 128 x 192).
COPY_RATE = 4.25e12
COPY_SHARE = 0.85
CACHE_RATE = 12e12
# The time that ``hopper_project`` and ``hopper_pull`` are taken to need for storing a tile, when no products run. The
# gradient's consumers store while the other one multiplies, and the plain kernels' rates include it.
STORE_SECONDS = 3e-6
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by phase (``"launches"``: of all phases), and the number of launches."""

    seconds: dict[str, float]
    launches: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    def table(self) -> str:
        """A row for each phase, then their sum, in milliseconds."""
        rows = [f"{name:<10}{seconds * 1e3:>9.2f}" for name, seconds in self.seconds.items()]
        return "\n".join(["phase            ms", *rows, f"{'sum':<10}{self.total * 1e3:>9.2f}"])


class _Work(NamedTuple):
    """A phase of one bucket: products of parts per multiply-add, bytes read from the cache per multiply-add, and bytes
    that a launch before or after it moves.
    """

    variant: Variant
    schedule: Schedule
    products: int
    read: float
    beside: int = 0

    def seconds(self) -> float:
        """Time of the program with the most to do."""
        programs = MULTIPROCESSORS * self.variant.blocks_per_sm
        multiply_adds = self.schedule.longest_cost
        computing = 2 * multiply_adds * self.products / (TENSOR_RATES[self.variant.kernel] / programs)
        reading = multiply_adds * self.read / (CACHE_RATE / programs)
        store = STORE_SECONDS if self.variant.kernel in ("hopper_project", "hopper_pull") else 0.0
        return max(computing, reading) + store * -(-len(self.schedule.order) // self.schedule.programs)


def predict(job: Job, limits: BucketLimits | None = None) -> Prediction:
    """The time of one evaluation with its gradient on one H200: W and G contiguous, bases in bfloat16.

    Args:
        job: what is computed, in one process; its GPU is not asked.
        limits: limits of one bucket; None for a GPU's.

    Raises:
        ValueError: the job is divided over several processes, whose traffic was not measured.
    """
    if job.world_size != 1:
        raise ValueError(
            f"job.world_size: got {job.world_size}, expected 1: traffic between processes was not measured"
        )
    specs = [
        WeightSpec(m, n, 0 if is_full((m, n), job.rank) else job.rank, parts=job.precision.planes)
        for m, n in job.shapes
    ]
    seconds: dict[str, float] = defaultdict(float)
    launches = 0
    for bucket in plan_buckets(specs, limits):
        shapes = [job.shapes[i] for i in bucket]
        moved = {phase.name: phase.bytes for phase in rank_phases(job, [Shard.whole(shape) for shape in shapes])}
        count = 3
        if specs[bucket[0]].rank == 0:
            seconds["full"] += moved["full"] / (COPY_SHARE * COPY_RATE)
        else:
            works, count = _plan(job, shapes)
            for name, work in works.items():
                rate = COPY_SHARE * COPY_RATE
                seconds[name] += max(work.seconds(), moved[name] / rate) + work.beside / rate
        launches += count
    return Prediction({**seconds, "launches": launches * LAUNCH_SECONDS}, launches)


def _plan(job: Job, shapes: list[tuple[int, int]]) -> tuple[dict[str, _Work], int]:
    """The phases of a bucket of one orientation, and its number of launches."""
    profile = Profile("sm_90", MULTIPROCESSORS, DESCRIPTORS["sm_90"])
    precision, rank, width = job.precision, job.rank, job.dtype.itemsize
    tall, aligned = shapes[0][0] > shapes[0][1], rank % 4 == 0
    problems = tuple(contiguous_problem(*shape, rank) for shape in shapes)
    forward = plan_forward(
        profile, ProjectKey(precision, rank_class(rank), tall, tall, aligned), problems, not job.keep_base, aligned
    )
    key = PullKey(precision.basis, precision.weight, rank_class(rank), tall, tall, aligned, aligned)
    backward = plan_backward(profile, key, problems, aligned, True)
    m, n, _ = forward.project.blocks
    of_project = (m * (width + 2 * job.keep_base) + 2 * n) / (m * n)
    m, n, _ = backward.gradient.blocks
    of_gradient = 2 * (m + n) / (m * n) + 2 * width / rank
    # C is read in float32 and written in bfloat16; sums of stretches are written and read.
    rounded = 0 if backward.rounding is None else len(shapes) * rank * rank * (4 + 2)
    works = {
        "project": _Work(forward.project, forward.project_schedule, precision.weight_parts, of_project),
        "drift": _Work(forward.drift, forward.drift_schedule, 1, 0.0, 8 * forward.partial_size),
        "pull": _Work(backward.pull, backward.pull_schedule, 1, 0.0, rounded),
        "gradient": _Work(backward.gradient, backward.gradient_schedule, 1, of_gradient),
    }
    # One more launch sums the squares.
    return works, len(forward.schedules) + 1 + len(backward.schedules)
