"""Ranks that add the penalty each by itself must mean the same anchors, or replicas drift apart without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from ..training import RotationPenalty


def check_replicas(penalty: RotationPenalty) -> None:
    """Raise a ValueError on every rank unless all have anchored the same weights. Every rank makes this call."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    # The digest is of whole weights, however they lie.
    digest = penalty.state_dict()["anchors"]
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest)
    others = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if others:
        raise ValueError(
            f"anchors: got those of other weights on ranks {others} than on rank 0, expected the same on all: they "
            "were made before the ranks' weights were made equal. Seed all ranks alike before the model is made (new "
            "layers are random), load the same weights everywhere, or keep the anchors in one file: "
            "RotationPenalty(path=...)"
        )
