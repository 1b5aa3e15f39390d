"""Costs of one evaluation of R and its gradient for each rank of a job, computed from shapes alone.

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
    """Count each rank's costs for weights of these shapes; arguments and errors are those of :func:`plan_shards`."""
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
    """A table with two rows for each N of ``ranks``: the largest rank's numbers, and those of the published way."""
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
