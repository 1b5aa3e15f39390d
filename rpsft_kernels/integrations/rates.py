"""Learning rates of a step, as ``RotationPenalty.after_step_`` takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def read_rates(groups: Sequence[dict[str, Any]]) -> float | dict[int, float]:
    """Return the learning rate of an optimizer's groups, or where they differ each parameter's by its ``id``."""
    rates = [float(group["lr"]) for group in groups]
    if len(set(rates)) == 1:
        return rates[0]
    return {id(p): rate for group, rate in zip(groups, rates, strict=True) for p in group["params"]}
