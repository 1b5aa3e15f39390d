"""Predicts by a roofline how long each phase of R and its gradient takes on a GPU. Nothing is timed.

Each phase lasts as long as the resource that it needs longest: tensor cores, DRAM, the link to other ranks, or
launches. Phases follow one another: the model does not assume that the exchange hides behind the next projection.

The table is for an (r, c) rectangle of a rank's shard, where s and l are its shorter and longer side, w is the bytes of
an element of W and G, and k is the rank. The longer side is contracted first, so that T and P are (s, k), in bfloat16
like U and V:

======== =================== =========================================================================================
phase    FLOPs               bytes
======== =================== =========================================================================================
project  2 r c k             r c (w + 2): W and W0, once (block form: W alone); 2 l k: V; 2 s k: T
drift    2 s k^2             2 s k: T; 2 s k: U; 4 k^2: C (block form: and B); further rectangles of a shard: 12 k^2
exchange                     ring of N ranks: 2 (N - 1) / N of all C sent; C 5 times: packed (2), squared and summed (3)
pull     2 s k^2             2 s k: U; 4 k^2: C; 2 s k: P
gradient 2 r c k             2 s k: P; 2 l k: V; 2 w r c: G, read and written
full     4 r c               2 r c (w + 2): W and W0, for R and again for the gradient; 2 w r c: G
======== =================== =========================================================================================

(For r > c, U and V change places.) The block form's T has three bfloat16 parts, and so have float32 weights: they
multiply the bytes of T and the FLOPs accordingly. Every operand is counted once a phase: tiles are assumed to find
shared operands in the second-level cache, but a phase is not assumed to find another phase's data there. W0 is in
bfloat16, as from a bfloat16 checkpoint.

The published way is a loop over whole weights on every rank. It makes a float16 copy of each weight, computes
``((U^T W) V - B)^2`` and its backward pass, and casts the (m, n) float16 gradient to W's dtype to add it to ``.grad``.
Each of these is a kernel of its own that reads and writes DRAM; gathers of sharded weights hide behind nothing either.
Three assumptions favour it: it reaches the same shares of the peaks, its kernels follow each other without a gap, and
only host time beyond the GPU's own time is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..costs import (
    drift_bytes,
    elementwise_bytes,
    full_flops,
    inner_flops,
    is_full,
    outer_flops,
)
from ..distributed.partition import Layout, plan_shards
from ..distributed.shard import Shard
from ..ops.buckets import WeightSpec, plan_buckets
from ..ops.triton.aot.targets import DESCRIPTORS
from ..ops.triton.device import Profile
from ..ops.triton.layout import Problem, ProjectKey, PullKey, type_name
from ..ops.triton.project_drift import plan_forward
from ..ops.triton.pull_back import plan_backward
from ..ops.triton.tile_table import rank_class
from ..ops.triton.variants import Precision
from .gpus import Gpu
from .shards import shard_costs

# Assumptions, printed with every prediction: the shares of the peaks that good kernels and collectives reach, the time
# of a launch on the GPU, and the host's time for a small operator of PyTorch.
TENSOR_SHARE = 0.75
DRAM_SHARE = 0.85
LINK_SHARE = 0.75
LAUNCH_SECONDS = 5e-6
OPERATOR_SECONDS = 8e-6


@dataclass(frozen=True)
class Job:
    """Weights (m, n) of one dtype, k = ``rank``, the form of their anchors, and the GPUs over which the weights lie."""

    shapes: Sequence[tuple[int, int]]
    rank: int
    gpu: Gpu
    world_size: int = 1
    layout: Layout = "shard0"
    keep_base: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def precision(self) -> Precision:
        return Precision(type_name(self.dtype), "bf16" if self.keep_base else None, "bf16")


@dataclass(frozen=True)
class Phase:
    """One phase's use of each resource; its launches take ``launch_seconds``."""

    name: str
    flops: int = 0
    bytes: int = 0
    sent: int = 0
    launches: int = 0
    launch_seconds: float = 0.0

    def times(self, gpu: Gpu) -> dict[str, float]:
        """Seconds by resource."""
        return {
            "tensor cores": self.flops / (TENSOR_SHARE * gpu.tensor),
            "memory": self.bytes / (DRAM_SHARE * gpu.dram),
            "network": self.sent / (LINK_SHARE * gpu.link),
            "launches": self.launch_seconds,
        }

    def seconds(self, gpu: Gpu) -> float:
        return max(self.times(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        """The resource that it needs longest."""
        times = self.times(gpu)
        return max(times, key=times.__getitem__) if self.seconds(gpu) else "-"


def total_seconds(phases: Sequence[Phase], gpu: Gpu) -> float:
    return sum(phase.seconds(gpu) for phase in phases)


def rank_phases(job: Job, shards: Sequence[Shard]) -> list[Phase]:
    """Count the phases that one rank computes on its shards, without launches and traffic between ranks."""
    precision, rank, w, kept = job.precision, job.rank, job.dtype.itemsize, job.keep_base
    flops, moved = Counter[str](), Counter[str]()
    block = drift_bytes(rank)
    for shard in shards:
        if is_full(shard.shape, rank):
            flops["full"] += full_flops(shard.numel)
            moved["full"] += elementwise_bytes(shard.numel, w, base_reads=2, weight_reads=2)
            continue
        for r, c in (rect.shape for rect in shard.rects):
            short, long = 2 * rank * min(r, c), 2 * rank * max(r, c)
            large, small = outer_flops((r, c), rank), inner_flops((r, c), rank)
            flops.update(
                project=large * precision.weight_parts, drift=small * precision.planes, pull=small, gradient=large
            )
            moved["project"] += r * c * (w + 2 * kept) + long + short * precision.planes
            moved["drift"] += short * precision.planes + short + block
            moved["pull"] += short + block + short
            moved["gradient"] += short + long + 2 * w * r * c
        moved["drift"] += block * (3 * max(0, len(shard.rects) - 1) + (not kept and shard.numel > 0))
    return [Phase(name, flops[name], moved[name]) for name in ("project", "drift", "pull", "gradient", "full")]


def rank_launches(job: Job, shards: Sequence[Shard]) -> Counter[str]:
    """Count one rank's launches by phase, from the launcher's plans.

    Args:
        job: the weights and the GPU.
        shards: the rank's shard of each weight, empty ones too.
    """
    gpu, precision, rank = job.gpu, job.precision, job.rank
    profile = Profile(gpu.architecture, gpu.multiprocessors, DESCRIPTORS[gpu.architecture])
    # Buckets are made from whole weights, so that every rank has the same buckets.
    specs = [
        WeightSpec(*shard.shape, rank=0)
        if is_full(shard.shape, rank)
        else WeightSpec(*shard.shape, rank, key=shard.unsharded, parts=precision.planes)
        for shard in shards
    ]
    launches = Counter[str]()
    for bucket in plan_buckets(specs):
        rects_by_weight = [shards[i].rects for i in bucket]
        if specs[bucket[0]].rank == 0:
            launches["full"] += 3 * any(rects_by_weight)
            continue
        sizes = [rect.shape for rects in rects_by_weight for rect in rects]
        for transposed in (False, True):
            problems = tuple(Problem(min(m, n), max(m, n), rank) for m, n in sizes if (m > n) == transposed)
            if not problems:
                continue
            key = ProjectKey(precision, rank_class(rank), transposed, transposed, True)
            plan = plan_forward(profile, key, problems, not job.keep_base, rank % 4 == 0)
            pull_key = PullKey(precision.basis, precision.weight, key.rank_class, transposed, transposed, True, True)
            backward = plan_backward(profile, pull_key, problems, rank % 4 == 0, True)
            # The drift's launches include its second pass, where there is one, and the sums of squares; the pull's
            # the rounding of C, where there is one.
            launches.update(project=1, drift=len(plan.schedules), pull=len(backward.schedules) - 1, gradient=1)
        if any(len(rects) != 1 for rects in rects_by_weight):
            # PyTorch adds and squares the C of a shard's rectangles, weight by weight.
            launches["drift"] += sum(1 + max(1, len(rects)) for rects in rects_by_weight)
        if not shards[bucket[0]].unsharded:
            # Four kernels: C are packed, sent, squared and summed.
            launches["exchange"] += 4
    return launches


def our_phases(job: Job) -> tuple[int, list[Phase]]:
    """Find the rank that computes longest, and its phases; errors as for :func:`plan_shards`."""
    shards_by_weight = plan_shards(job.shapes, job.rank, job.world_size, job.layout)
    shards_by_rank = [[shards[i] for shards in shards_by_weight] for i in range(job.world_size)]
    computed = [rank_phases(job, shards) for shards in shards_by_rank]
    busiest = max(range(job.world_size), key=lambda i: total_seconds(computed[i], job.gpu))
    costs = shard_costs(job.shapes, job.rank, job.world_size, job.layout)
    exchange = Phase("exchange", bytes=5 * costs.buffer_bytes + 2 * costs.sent_bytes, sent=costs.sent_bytes)
    project, drift, *others = computed[busiest]
    phases = [project, drift, exchange, *others]
    launches = rank_launches(job, shards_by_rank[busiest])
    return busiest, [
        replace(phase, launches=launches[phase.name], launch_seconds=launches[phase.name] * LAUNCH_SECONDS)
        for phase in phases
    ]


def published_phases(job: Job) -> list[Phase]:
    """Count every rank's phases in the published way, for one micro-batch; launches are operators of PyTorch."""
    shapes, k, w = job.shapes, job.rank, job.dtype.itemsize
    sent = shard_costs(shapes, k, job.world_size, job.layout).published_sent_bytes * w // 2
    full = [shape for shape in shapes if is_full(shape, k)]
    projected = [shape for shape in shapes if not is_full(shape, k)]
    count, numel = len(projected), sum(m * n for m, n in projected)
    high, wide = 2 * k * sum(m for m, _ in projected), 2 * k * sum(n for _, n in projected)
    block, large, small = 2 * k * k * count, 2 * numel * k, k * wide
    elements = sum(m * n for m, n in full)
    phases = [
        Phase("gather", bytes=2 * sent, sent=sent, launches=len(shapes) * (sent > 0)),
        Phase("cast", bytes=numel * (w + 2), launches=count),
        Phase("project", large, 2 * numel + high + wide, launches=count),
        # Five kernels: the product, the subtraction, the square, the sum and the sum's cast.
        Phase("drift", small, 2 * wide + 7 * block, launches=5 * count),
        # Five kernels: the backward passes of the cast and the square take four, the product one.
        Phase("pull", small, 2 * wide + 7 * block, launches=5 * count),
        Phase("gradient", large, high + wide + 2 * numel, launches=count),
        Phase("cast back", bytes=numel * (2 + w), launches=count),
        Phase("add", bytes=3 * w * numel, launches=count),
        # Eleven kernels: forward the cast, subtraction, square, sum and its cast; backward two casts, three for the
        # square, and the addition.
        Phase("full", full_flops(elements), elements * (5 * w + 28), launches=11 * len(full)),
    ]
    operators = sum(phase.launches for phase in phases)
    unhidden = max(0.0, operators * OPERATOR_SECONDS - total_seconds(phases, job.gpu))
    return [*phases, Phase("host", launch_seconds=unhidden)]


def phase_table(phases: Sequence[Phase], gpu: Gpu) -> str:
    """Write a table with a row for each phase, then their sum."""
    lines = ["phase        TFLOP       GB  sent GB  launches       ms  bound by"]
    total = Phase(
        "sum", *(sum(getattr(phase, name) for phase in phases) for name in ("flops", "bytes", "sent", "launches"))
    )
    for phase in [*phases, total]:
        seconds = total_seconds(phases, gpu) if phase is total else phase.seconds(gpu)
        lines.append(
            f"{phase.name:<10}{phase.flops / 1e12:>8.3f}{phase.bytes / 1e9:>9.3f}{phase.sent / 1e9:>9.3f}"
            f"{phase.launches:>10}{seconds * 1e3:>9.3f}  {'' if phase is total else phase.bound(gpu)}".rstrip()
        )
    return "\n".join(lines)
