"""Dual ascent: the coefficient that holds R at a budget, from R of the step before."""

from __future__ import annotations

import math

# How far log(lambda) moves in a step, for R that is twice its bound.
_RATE = 0.1
# The part of the coefficient's logarithm that answers at once. Without it lambda overshoots by what it has learned too
# late; with 3 or more an Adam at large learning rates begins to swing.
_RESPONSE = 1.5
# Lambda rises to at most this many times what it began with: a budget that steps of the optimizer pass by themselves
# would drive it up without end, and nothing be learned any more when they become smaller.
_MOST = 100.0


class DualAscent:
    """The coefficient that holds R at a bound ``r = budget^2 sum sigma^2``.

    With ``e = R / r - 1`` of the step before: ``lambda *= exp(0.1 clip(e, -1, 2))``, between a share ``least`` and 100
    times what it began with, and ``coeff = lambda exp(1.5 clip(e, -1, 1))``.

    Lambda alone would fall without end while R has not come near its bound, and would take as long to rise again when
    R passes it. The share is one with which the penalty is hardly felt.

    Attributes:
        multiplier: lambda; None before :meth:`start`, which can wait, because R and its gradient are 0 at W0.
        coeff: None as lambda.
    """

    def __init__(self, least: float) -> None:
        self._least = least
        self.multiplier: float | None = None
        self.coeff: float | None = None
        self._first = 0.0

    def start(self, gradient: float, bound: float) -> None:
        """Begin with the lambda for which R's gradient, ``2 lambda sqrt(R)`` in norm, is as large as the task's once R
        is at its bound.
        """
        self._first = self.multiplier = gradient / (2.0 * math.sqrt(bound))
        self.coeff = self.multiplier * math.exp(-_RESPONSE)

    def update(self, penalty: float, bound: float) -> None:
        """Take the R of a step into account.

        Raises:
            ValueError: R is not finite.
        """
        if not math.isfinite(penalty):
            raise ValueError(f"weights: got R = {penalty} in the step before, expected finite weights")
        if self.multiplier is None:
            return
        error = penalty / bound - 1.0
        moved = self.multiplier * math.exp(_RATE * max(-1.0, min(2.0, error)))
        self.multiplier = min(max(moved, self._least * self._first), _MOST * self._first)
        self.coeff = self.multiplier * math.exp(_RESPONSE * max(-1.0, min(1.0, error)))

    def state(self) -> list[float] | None:
        """Return all of it in plain numbers; None before :meth:`start`."""
        if self.multiplier is None or self.coeff is None:
            return None
        return [self.multiplier, self.coeff, self._first]

    def restore(self, state: list[float] | None) -> None:
        """Take over what :meth:`state` returned."""
        self.multiplier, self.coeff, self._first = (None, None, 0.0) if state is None else state
