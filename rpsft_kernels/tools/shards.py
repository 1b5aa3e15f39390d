"""What the rotation penalty costs each rank of a job, from shapes alone: one evaluation of R and its gradient.

- FLOPs: 4 r c k + 4 k^2 min(r, c) of each (r, c) tile of a rank's part, 4 r c of a full anchor. Tiles shorter than the
  weight's shorter side add to the k^2 term: the sum over ranks exceeds what the undivided model takes.
- Network: C (k, k), float32, of each weight whose C is a sum over ranks, by a ring: 2 (N - 1) / N of the buffer sent.
- Memory traffic: everything in bfloat16. W and W0 read once (full anchors: twice, for R and for the gradient),
  gradients read and written, U and V read twice. C and B are left out, which do not shrink with N in sharded layouts.
- Memory: anchors with their padding, and a float32 C of every projected weight of which the rank holds a part or, where
  C is a sum over ranks, another does; no workspace.
- The published way: every rank computes all with whole weights, gathered in bfloat16 in every micro-batch where they
  are sharded, and keeps U, V and U^T W0 V (full anchors: W0) of all weights in float16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..costs import anchor_bytes, drift_bytes, is_full, shard_flops, step_bytes, step_flops
from ..distributed.partition import Layout, plan_shards


@dataclass(frozen=True)
class ShardCosts:
    """One number per rank in each list; the others are the same on every rank.

    ``buffer_bytes`` of C are summed over ranks, which sends ``sent_bytes``; ``drift_bytes`` of C are held during the
    call. ``whole_flops`` are those of the undivided model.
    """

    layout: Layout
    ranks: int
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
        return max(self.flops) * self.ranks / self.whole_flops


def shard_costs(
    shapes: Sequence[tuple[int, int]], rank: int, ranks: int, layout: Layout, keep_base: bool = True
) -> ShardCosts:
    """What each rank pays for weights of these shapes; arguments and errors as for :func:`plan_shards`."""
    parts = plan_shards(shapes, rank, ranks, layout)
    held = [[row[i] for row in parts if row[i].numel] for i in range(ranks)]
    projected = [row for row in parts if not is_full(row[0].shape, rank)]
    block = drift_bytes(rank)
    buffer = block * sum(not row[0].unsharded for row in projected)
    kept = [m * n if is_full((m, n), rank) else (m + n) * rank + rank * rank for m, n in shapes]
    gathered = 0 if layout == "replicated" else 2 * sum(m * n for m, n in shapes)
    return ShardCosts(
        layout=layout,
        ranks=ranks,
        flops=[sum(shard_flops(part, rank) for part in mine) for mine in held],
        elements=[sum(part.numel for part in mine) for mine in held],
        traffic_bytes=[sum(step_bytes(part, rank, keep_base) for part in mine) for mine in held],
        anchor_bytes=[sum(anchor_bytes(part, rank, keep_base) for part in mine) for mine in held],
        drift_bytes=[sum(block for row in projected if row[i].numel or not row[i].unsharded) for i in range(ranks)],
        buffer_bytes=buffer,
        sent_bytes=2 * (ranks - 1) * buffer // ranks,
        whole_flops=sum(step_flops(shape, rank) for shape in shapes),
        published_sent_bytes=(ranks - 1) * gathered // ranks,
        published_anchor_bytes=2 * sum(kept),
    )


def shard_table(
    shapes: Sequence[tuple[int, int]], rank: int, ranks: Sequence[int], layout: Layout, keep_base: bool = True
) -> str:
    """For each N of ``ranks`` a row with the largest rank's number in each column, and the published way's."""
    lines = ["layout      ranks    TFLOP   of 1/N  buffer GB  sent GB  traffic GB  anchors GiB   C GiB"]
    for n in ranks:
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
