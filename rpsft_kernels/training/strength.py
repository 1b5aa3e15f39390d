"""The coefficient of a step: a number or a schedule, warmed up."""

from __future__ import annotations

from ..checks import read_coeff
from .settings import Coefficient


class Schedule:
    """``coeff`` at each step, from 0; it rises from 0 within the first ``warmup`` steps."""

    def __init__(self, coeff: Coefficient, warmup: int) -> None:
        self._coeff, self._warmup = coeff, warmup

    def at(self, step: int) -> float:
        """Return the coefficient of a step.

        Raises:
            ValueError: a callable returned no finite number of at least 0.
        """
        given = self._coeff(step) if callable(self._coeff) else self._coeff
        coeff = read_coeff(given)
        if coeff < 0:
            raise ValueError(
                f"coeff: got {coeff!r} at step {step}, expected at least 0: a negative one rewards rotation"
            )
        return coeff * min(1.0, step / self._warmup) if self._warmup else coeff
