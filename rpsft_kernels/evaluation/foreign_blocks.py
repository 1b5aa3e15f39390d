"""Blocks that another arithmetic has computed than the one that uses them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch

from .. import ops
from ..anchors.anchor import Anchor
from .plan import Found

# Once per anchor, not once per step.
_reported: weakref.WeakSet[Anchor] = weakref.WeakSet()


def foreign_blocks(found: Found) -> Iterator[str]:
    """A warning for each anchor whose block was computed by another arithmetic, the first time that it is used so."""
    if found.plan.looked_for_foreign_blocks or torch.compiler.is_compiling():
        return
    found.plan.looked_for_foreign_blocks = True
    for bucket in found.plan.buckets:
        for one in (found.weights[i] for i in bucket.members):
            name, weight, anchor = one.name, one.weight, one.anchor
            if anchor.block is None or not anchor.block.numel() or anchor in _reported:
                continue
            arithmetic = ops.arithmetic_id(bucket.backend, weight.device, weight.dtype)
            if anchor.arithmetic == arithmetic:
                continue
            _reported.add(anchor)
            # Relative to the block: its norm lies on the GPU, which a step does not wait for.
            residual = torch.finfo(torch.float32).eps ** 2
            yield (
                f"{name}: the anchor's block was computed by {anchor.arithmetic!r} and is used by {arithmetic!r}, "
                "which rounds differently: at the pretrained weight its penalty is not exactly 0 but of the order of "
                f"{residual:.1e} ||B||_F^2, where B is the block. Rebuild it from the pretrained weight: "
                "Anchors.load(path, model) or Anchor.rebuilt_block(weight); or keep the base"
            )
