"""The numbers of one step that logs, read when they are asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .reading import Reading


@dataclass
class Record:
    """One step. ``gradient`` is ``||g||^2`` of the task, None where it is not known."""

    step: int
    coeff: float
    penalty: Reading
    gradient: Reading | None

    def metrics(self, energy: float, budget: float | None) -> dict[str, float]:
        """Return them by name; waits for the device."""
        penalty = self.penalty.read()[0]
        relative = math.sqrt(max(penalty, 0.0) / energy) if energy else 0.0
        found = {
            "rotation/R": penalty,
            "rotation/loss": self.coeff * penalty,
            "rotation/coeff": self.coeff,
            "rotation/relative": relative,
        }
        if budget is not None:
            found["rotation/budget_used"] = relative / budget
        ratio = self.grad_ratio()
        if ratio is not None:
            found["rotation/grad_ratio"] = ratio
        return found

    def grad_ratio(self) -> float | None:
        """Return the norm of R's gradient, ``2 coeff sqrt(R)``, over the task's; None where that is 0 or unknown."""
        squared = 0.0 if self.gradient is None else self.gradient.read()[0]
        if not squared > 0.0 or not math.isfinite(squared):
            return None
        return 2.0 * self.coeff * math.sqrt(max(self.penalty.read()[0], 0.0) / squared)
