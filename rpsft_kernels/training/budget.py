"""Dual ascent: the coefficient that holds R at a budget, from R of the step before."""

from __future__ import annotations

import math

# Steps that the coefficient takes, as a share of its logarithm.
_RATE = 0.05


class DualAscent:
    """The coefficient lambda that holds R at a bound ``r = budget^2 sum sigma^2``.

    ``lambda *= exp(0.05 clip(R / r - 1, -1, 2))``, from the R of each step to the coefficient of the next. It is None
    before :meth:`start`, which can wait: R and its gradient are 0 at W0.
    """

    def __init__(self) -> None:
        self.coeff: float | None = None

    def start(self, gradient: float, bound: float) -> None:
        """Begin with the coefficient for which R's gradient, ``2 lambda sqrt(R)`` in norm, is as large as the task's
        once R is at its bound.
        """
        self.coeff = gradient / (2.0 * math.sqrt(bound))

    def update(self, penalty: float, bound: float) -> None:
        """Take the R of a step into account.

        Raises:
            ValueError: R is not finite.
        """
        if not math.isfinite(penalty):
            raise ValueError(f"weights: got R = {penalty} in the step before, expected finite weights")
        if self.coeff is not None:
            self.coeff *= math.exp(_RATE * max(-1.0, min(2.0, penalty / bound - 1.0)))
