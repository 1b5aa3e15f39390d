"""What anchors take, before any is made."""

from __future__ import annotations

from .pieces import padded_columns
from .sharding.part import Part


def is_full(part: Part, rank: int) -> bool:
    """Whether the anchor of a weight is in full form: W0 alone."""
    return rank >= min(part.shape)


def bases_bytes(part: Part, rank: int, basis_bytes: int) -> int:
    """Of a part's rows of U and V."""
    return sum(part.bounds.shape) * padded_columns(rank) * basis_bytes


def anchor_bytes(part: Part, rank: int, keep_base: bool, basis_bytes: int = 2, base_bytes: int = 2) -> int:
    """``Anchor.nbytes`` of a part's anchor: of rank k = ``rank`` and, from min(m, n) on, in full form.

    ``basis_bytes`` and ``base_bytes`` are of one element. A block is in float32, as of all but float64 weights.
    """
    if is_full(part, rank):
        return part.numel * base_bytes
    kept = part.numel * base_bytes if keep_base else 4 * rank * rank * (part.numel > 0)
    return bases_bytes(part, rank, basis_bytes) + kept
