"""The checks that integrations share of the penalty that they are given."""

from __future__ import annotations

import warnings

from ..training import RotationPenalty


def check_penalty(value: object, name: str) -> None:
    """Raise a ValueError unless an argument is a ``RotationPenalty``."""
    if not isinstance(value, RotationPenalty):
        raise ValueError(
            f"{name}: got {type(value).__name__}, expected a RotationPenalty: rk.RotationPenalty(rank=64, coeff=1.0); "
            "for a run without the penalty leave it out, and use the framework's own class"
        )


def warn_of_second_training(penalty: RotationPenalty) -> None:
    """Say that a penalty which has counted steps goes on from there, though nothing is resumed."""
    warnings.warn(
        f"a training begins, and its rotation penalty has counted {penalty.step} steps: its warm-up and schedule, or a "
        "budget's coefficient, go on from there. A run of its own needs a new RotationPenalty",
        stacklevel=3,
    )
