"""The check that every integration makes of what it is given."""

from __future__ import annotations

from ..training import RotationPenalty


def check_penalty(value: object, name: str) -> None:
    """Raise a ValueError unless an argument is a ``RotationPenalty``."""
    if not isinstance(value, RotationPenalty):
        raise ValueError(
            f"{name}: got {type(value).__name__}, expected a RotationPenalty: rk.RotationPenalty(rank=64, coeff=1.0); "
            "for a run without the penalty leave it out, and use the framework's own class"
        )
