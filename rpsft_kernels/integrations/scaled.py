"""What GradScaler does to the gradients of a step, by the optimizers that Accelerate wraps (Trainer has them, too)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..training import RotationPenalty


def read_scale(scaler: Any) -> float:
    """Return what the gradients of a backward pass are multiplied by; 1 without a scaler."""
    return 1.0 if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def was_skipped(optimizer: Any, penalty: RotationPenalty) -> bool:
    """Whether the optimizer has just skipped the step that the penalty was added for, because gradients overflowed.

    Fused optimizers are called for a step that they skip, which their wrapper does not tell; the scale does.
    """
    scaler = getattr(optimizer, "scaler", None)
    fell = scaler is not None and penalty.scale is not None and read_scale(scaler) < penalty.scale
    return fell or bool(getattr(optimizer, "step_was_skipped", False))
