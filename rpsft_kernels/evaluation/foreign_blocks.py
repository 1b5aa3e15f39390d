"""A warning of blocks that were computed by another arithmetic than the one that uses them."""

from __future__ import annotations

import warnings
import weakref

import torch

from .. import ops
from ..anchors.anchor import Anchor
from ..checks import dtype_name
from .caller import level_of_caller
from .plan import PlannedWeights

# Anchors that a warning has named already: each is named once, not once per step.
_reported: weakref.WeakSet[Anchor] = weakref.WeakSet()
# Names of weights, by the arithmetics or the dtypes of the anchor and of the weight.
_Names = dict[tuple[str | None, str], list[str]]


def warn_of_foreign_blocks(planned: PlannedWeights) -> None:
    """Warn once of all anchors whose blocks another arithmetic has computed; the warning points at the user's line.

    It is one warning, so that where warnings are errors the first block does not hide the others.
    """
    plan = planned.plan
    if plan.looked_for_foreign_blocks or torch.compiler.is_compiling():
        return
    plan.looked_for_foreign_blocks = True
    foreign, rounded = _find_foreign_blocks(planned)
    if foreign:
        warnings.warn(_message(foreign, rounded), UserWarning, stacklevel=level_of_caller())


def _find_foreign_blocks(planned: PlannedWeights) -> tuple[_Names, _Names]:
    """Return the names of weights with foreign blocks by arithmetics, and of those in another dtype by dtypes."""
    foreign: _Names = {}
    rounded: _Names = {}
    for bucket in planned.plan.buckets:
        for anchored in (planned.weights[i] for i in bucket.members):
            weight, anchor = anchored.weight, anchored.anchor
            if anchor.block is None or not anchor.block.numel() or anchor in _reported:
                continue
            arithmetic = ops.arithmetic_id(bucket.backend, weight.device, weight.dtype)
            if anchor.arithmetic != arithmetic:
                _reported.add(anchor)
                foreign.setdefault((anchor.arithmetic, arithmetic), []).append(anchored.name)
                if anchor.weight_dtype != weight.dtype:
                    dtypes = dtype_name(anchor.weight_dtype), dtype_name(weight.dtype)
                    rounded.setdefault(dtypes, []).append(anchored.name)
    return foreign, rounded


def _message(foreign: _Names, rounded: _Names) -> str:
    # The residual is given relative to the block: its norm lies on the GPU, which a step does not wait for.
    residual = torch.finfo(torch.float32).eps ** 2
    blocks = "; ".join(
        f"{', '.join(names)}: the anchor's block was computed by {computed!r} and is used by {used!r}"
        for (computed, used), names in foreign.items()
    )
    message = (
        f"{blocks}, which rounds differently: at the pretrained weight its penalty is not exactly 0 but of the order "
        f"of {residual:.1e} ||B||_F^2, where B is the block. Rebuild it from the pretrained weight: "
        "Anchors.load(path, model) or Anchor.rebuilt_block(weight); or keep the base"
    )
    for (anchored, held), names in rounded.items():
        message += (
            f". {', '.join(names)}: got {held} weights for blocks of {anchored} ones, expected the dtype that was "
            "anchored: if W0 was rounded in between, R counts the rounding, many times what a step at a learning rate "
            f"of 1e-6 adds, and no rebuilding helps: anchor the weights in {held}, or keep the base"
        )
    return message
