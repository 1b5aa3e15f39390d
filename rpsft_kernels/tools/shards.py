"""Computes, from shapes alone, the costs of one evaluation of R and its gradient for each rank of a job.

- FLOPs: an (r, c) rectangle of a rank's shard takes 4 r c k + 4 k^2 min(r, c), or 4 r c under a full anchor. The k^2
  term does not shrink with a rectangle's longer side, so the sum over ranks can exceed the undivided model's FLOPs.
- Network: each weight whose C (k, k) is a sum over ranks adds its C in float32 to a buffer. A ring all-reduce sends
  2 (N - 1) / N of that buffer.
- Memory traffic: everything is counted in bfloat16. W and W0 are read once (full anchors: twice, for R and for the
  gradient), gradients are read and written, U and V are read twice. C and B are left out, because they do not shrink
  with N in sharded layouts.
- Memory: anchors with their padding are counted, and one float32 C for each projected weight that the rank holds a
  shard of or whose C is a sum over ranks. The workspace is not counted.
- The published way: every rank computes everything with whole weights, which it gathers in bfloat16 in every
  micro-batch where they are sharded. It keeps U, V and U^T W0 V (full anchors: W0) of all weights in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..costs import anchor_bytes, drift_bytes, is_full, shard_flops, step_bytes, step_flops
from ..distributed.partition import Layout, plan_shards


@dataclass(frozen=True)
class ShardCosts:
    """Costs of a job. A list has one number per rank; any other field is the same on every rank.

    Attributes:
        drift_bytes: bytes of C that a rank holds during the call.
        buffer_bytes: bytes of C that are summed over ranks; the sum sends ``sent_bytes``.
        whole_flops: FLOPs of the undivided model.
    """

    layout: Layout
    world_size: int
    flops: list[int]
    elements: list[int]
    traffic_bytes: list[int]
    anchor_bytes: list[int]
    drift_bytes: list[int]
    buffer_bytes: int
    sent_bytes: int
    whole_flops: int
    published_sent_bytes: int
    published_anchor_bytes: int

    @property
    def share(self) -> float:
        """The busiest rank's FLOPs over an N-th of the undivided model's."""
        return max(self.flops) * self.world_size / self.whole_flops


def shard_costs(
    shapes: Sequence[tuple[int, int]], rank: int, world_size: int, layout: Layout, keep_base: bool = True
) -> ShardCosts:
    """Count each rank's costs for weights of these shapes; arguments and errors are those of :func:`plan_shards`."""
    shards_by_weight = plan_shards(shapes, rank, world_size, layout)
    held = [[shards[i] for shards in shards_by_weight if shards[i].numel] for i in range(world_size)]
    projected = [shards for shards in shards_by_weight if not is_full(shards[0].shape, rank)]
    block = drift_bytes(rank)
    buffer = block * sum(not shards[0].unsharded for shards in projected)
    kept = [m * n if is_full((m, n), rank) else (m + n) * rank + rank * rank for m, n in shapes]
    gathered = 0 if layout == "replicated" else 2 * sum(m * n for m, n in shapes)
    return ShardCosts(
        layout=layout,
        world_size=world_size,
        flops=[sum(shard_flops(shard, rank) for shard in shards) for shards in held],
        elements=[sum(shard.numel for shard in shards) for shards in held],
        traffic_bytes=[sum(step_bytes(shard, rank, keep_base) for shard in shards) for shards in held],
        anchor_bytes=[sum(anchor_bytes(shard, rank, keep_base) for shard in shards) for shards in held],
        drift_bytes=[
            sum(block for shards in projected if shards[i].numel or not shards[i].unsharded) for i in range(world_size)
        ],
        buffer_bytes=buffer,
        sent_bytes=2 * (world_size - 1) * buffer // world_size,
        whole_flops=sum(step_flops(shape, rank) for shape in shapes),
        published_sent_bytes=(world_size - 1) * gathered // world_size,
        published_anchor_bytes=2 * sum(kept),
    )


def shard_table(
    shapes: Sequence[tuple[int, int]], rank: int, world_sizes: Sequence[int], layout: Layout, keep_base: bool = True
) -> str:
    """Write a table with two rows for each world size N: the largest rank's numbers, and the published way's."""
    lines = ["layout      ranks    TFLOP   of 1/N  buffer GB  sent GB  traffic GB  anchors GiB   C GiB"]
    for n in world_sizes:
        costs = shard_costs(shapes, rank, n, layout, keep_base)
        lines.append(
            f"{layout:<11}{n:>6}{max(costs.flops) / 1e12:>9.3f}{costs.share:>8.2f}x{costs.buffer_bytes / 1e9:>11.3f}"
            f"{costs.sent_bytes / 1e9:>9.3f}{max(costs.traffic_bytes) / 1e9:>12.3f}"
            f"{max(costs.anchor_bytes) / 2**30:>13.2f}{max(costs.drift_bytes) / 2**30:>8.2f}"
        )
        lines.append(
            f"{'published':<11}{n:>6}{costs.whole_flops / 1e12:>9.3f}{n:>8.2f}x{'-':>11}"
            f"{costs.published_sent_bytes / 1e9:>9.3f}{'-':>12}{costs.published_anchor_bytes / 2**30:>13.2f}"
            f"{'-':>8}"
        )
    return "\n".join(lines)
