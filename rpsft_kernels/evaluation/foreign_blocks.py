"""A warning of blocks that were computed by another arithmetic than the one that uses them."""

from __future__ import annotations

import inspect
import warnings
import weakref

import torch

from .. import ops
from ..anchors.anchor import Anchor
from .plan import PlannedWeights

# Anchors that a warning has named already: each is named once, not once per step.
_reported: weakref.WeakSet[Anchor] = weakref.WeakSet()
_PACKAGE = __name__.partition(".")[0]


def warn_of_foreign_blocks(planned: PlannedWeights) -> None:
    """Warn once of all anchors whose blocks another arithmetic has computed; the warning points at the user's line.

    It is one warning, so that where warnings are errors the first block does not hide the others.
    """
    plan = planned.plan
    if plan.looked_for_foreign_blocks or torch.compiler.is_compiling():
        return
    plan.looked_for_foreign_blocks = True
    foreign = _find_foreign_blocks(planned)
    if foreign:
        warnings.warn(_message(foreign), UserWarning, stacklevel=_level_of_caller())


def _find_foreign_blocks(planned: PlannedWeights) -> dict[tuple[str | None, str], list[str]]:
    """Return the names of weights with foreign blocks, by the arithmetics that computed and that use the block."""
    foreign: dict[tuple[str | None, str], list[str]] = {}
    for bucket in planned.plan.buckets:
        for anchored in (planned.weights[i] for i in bucket.members):
            weight, anchor = anchored.weight, anchored.anchor
            if anchor.block is None or not anchor.block.numel() or anchor in _reported:
                continue
            arithmetic = ops.arithmetic_id(bucket.backend, weight.device, weight.dtype)
            if anchor.arithmetic != arithmetic:
                _reported.add(anchor)
                foreign.setdefault((anchor.arithmetic, arithmetic), []).append(anchored.name)
    return foreign


def _message(foreign: dict[tuple[str | None, str], list[str]]) -> str:
    # The residual is given relative to the block: its norm lies on the GPU, which a step does not wait for.
    residual = torch.finfo(torch.float32).eps ** 2
    blocks = "; ".join(
        f"{', '.join(names)}: the anchor's block was computed by {computed!r} and is used by {used!r}"
        for (computed, used), names in foreign.items()
    )
    return (
        f"{blocks}, which rounds differently: at the pretrained weight its penalty is not exactly 0 but of the order "
        f"of {residual:.1e} ||B||_F^2, where B is the block. Rebuild it from the pretrained weight: "
        "Anchors.load(path, model) or Anchor.rebuilt_block(weight); or keep the base"
    )


def _level_of_caller() -> int:
    """Return the ``stacklevel`` with which a warning of the calling function points outside of this package."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level
