"""The numbers of one step that logs, read when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .reading import Reading


@dataclass
class Record:
    """One step.

    Attributes:
        step: its number, from 0.
        coeff: lambda; None in mode project, which has none.
        found: R as the step found it.
        kept: R as the step has left it, after a correction.
        gradient: ``||g||^2`` of the task; None where it is not known.
        names, layers: R of each weight, as the step found it; None unless asked for.
    """

    step: int
    coeff: float | None
    found: Reading
    kept: Reading
    gradient: Reading | None = None
    names: Sequence[str] = ()
    layers: Reading | None = None

    @property
    def arrived(self) -> bool:
        """Whether all numbers can be read without waiting."""
        readings = (self.found, self.kept, self.gradient, self.layers)
        return all(reading is None or reading.arrived for reading in readings)

    def metrics(self, energy: float, budget: float | None) -> dict[str, float]:
        """Return them by name; waits for the device."""
        penalty = self.kept.read()[0]
        relative = math.sqrt(max(penalty, 0.0) / energy) if energy else 0.0
        metrics = {"rotation/R": penalty, "rotation/relative": relative}
        if self.coeff is not None:
            metrics |= {"rotation/coeff": self.coeff, "rotation/loss": self.coeff * penalty}
        if budget is not None:
            metrics["rotation/budget_used"] = relative / budget
        ratio = self.grad_ratio()
        if ratio is not None:
            metrics["rotation/grad_ratio"] = ratio
        if self.layers is not None:
            by_weight = zip(self.names, self.layers.read(), strict=True)
            metrics |= {f"rotation/layers/{name}": value for name, value in by_weight}
        return metrics

    def grad_ratio(self) -> float | None:
        """Return the norm of R's gradient, ``2 coeff sqrt(R)``, over the task's; None where that is 0 or unknown."""
        squared = 0.0 if self.gradient is None else self.gradient.read()[0]
        if self.coeff is None or not squared > 0.0 or not math.isfinite(squared):
            return None
        return 2.0 * self.coeff * math.sqrt(max(self.found.read()[0], 0.0) / squared)
