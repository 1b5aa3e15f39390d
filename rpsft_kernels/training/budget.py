"""Dual ascent: the coefficient that holds R at a budget, from R of the step before."""

from __future__ import annotations

import math

# Steps that the coefficient takes, as a share of its logarithm.
_RATE = 0.05


class DualAscent:
    """The coefficient lambda of a budget ``r = budget^2 sum sigma^2`` of R.

    ``lambda *= exp(0.05 clip(R / r - 1, -1, 2))``, from the R of each step to the coefficient of the next. It begins
    at 0, because R and its gradient are 0 at W0, and with :meth:`start`.
    """

    def __init__(self, budget: float, energy: float) -> None:
        self.bound = budget * budget * energy
        self.coeff: float | None = None

    def start(self, task_gradient: float) -> None:
        """Begin with the coefficient for which R's gradient, ``2 lambda sqrt(R)`` in norm, is as large as the task's
        once R is at its budget.
        """
        self.coeff = task_gradient / (2.0 * math.sqrt(self.bound))

    def update(self, penalty: float) -> None:
        """Take the R of a step into account."""
        if self.coeff is not None:
            self.coeff *= math.exp(_RATE * max(-1.0, min(2.0, penalty / self.bound - 1.0)))
