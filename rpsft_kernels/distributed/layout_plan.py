"""How weights would lie over a number of ranks, by shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from .partition import divide
from .shard import Shard

Layout = Literal["shard0", "replicated", "flat"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def parts_of(shapes: Sequence[tuple[int, int]], rank: int, ranks: int, layout: Layout) -> list[list[Shard]]:
    """What of each weight (m, n) each of N = ``ranks`` ranks works on: ``parts[weight][rank]``.

    ``"shard0"``: chunks of ceil(m / N) rows (FSDP2). ``"replicated"``: weights whole, their work divided (DDP).
    ``"flat"``: ranges of ceil(m n / N) elements of each weight (DeepSpeed ZeRO-3).

    Raises:
        ValueError: ``rank`` or ``ranks`` is less than 1, or the layout is none of these.
    """
    if rank < 1 or ranks < 1 or layout not in LAYOUTS:
        raise ValueError(
            f"rank, ranks, layout: got {rank}, {ranks}, {layout!r}, expected at least 1 each, and one of {LAYOUTS}"
        )
    if ranks == 1:
        return [[Shard.whole(shape)] for shape in shapes]
    if layout == "replicated":
        return divide(shapes, [min(rank, *shape) for shape in shapes], ranks)
    if layout == "shard0":
        return [[Shard.rectangle((m, n), span, (0, n)) for span in _chunks(m, ranks)] for m, n in shapes]
    return [[Shard.range((m, n), *span) for span in _chunks(m * n, ranks)] for m, n in shapes]


def _chunks(length: int, count: int) -> list[tuple[int, int]]:
    """As torch.chunk cuts, and empty ones at the end."""
    size = -(-length // count)
    return [(min(length, size * i), min(length, size * (i + 1))) for i in range(count)]
