"""The agreement of a penalty's gradient with float64, and the bounds that the package promises for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

AnchorForm = Literal["base", "block"]

MIN_COSINE = 0.999
MAX_ERROR: dict[AnchorForm, float] = {"base": 0.01, "block": 0.02}
# The block form subtracts two projections as large as the weight: its promise begins where the drift is 4e-5 of that.
FIRST_STEP: dict[AnchorForm, int] = {"base": 1, "block": 10}


@dataclass(frozen=True)
class Agreement:
    """Sums over the entries of a gradient G and of its float64 reference E; those of several gradients add up.

    Attributes:
        product: sum of G E.
        size: sum of G^2; 0 only if every entry is exactly 0.
        exact: sum of E^2.
        difference: sum of (G - E)^2.
    """

    product: float = 0.0
    size: float = 0.0
    exact: float = 0.0
    difference: float = 0.0

    @classmethod
    def of(cls, gradient: Tensor, reference: Tensor) -> Agreement:
        """Sum over the entries of one gradient (m, n) in any dtype and its float64 reference (m, n)."""
        gradient = gradient.double()
        return cls(
            float((gradient * reference).sum()),
            float(gradient.square().sum()),
            float(reference.square().sum()),
            float((gradient - reference).square().sum()),
        )

    def __add__(self, other: Agreement) -> Agreement:
        return Agreement(
            self.product + other.product,
            self.size + other.size,
            self.exact + other.exact,
            self.difference + other.difference,
        )

    @property
    def cosine(self) -> float:
        """<G, E> / (||G|| ||E||); NaN where one of them is 0."""
        scale = math.sqrt(self.size * self.exact)
        return self.product / scale if scale else math.nan

    @property
    def relative_error(self) -> float:
        """||G - E|| / ||E||; NaN where E is 0."""
        return math.sqrt(self.difference / self.exact) if self.exact else math.nan


@dataclass(frozen=True)
class Measurement:
    """One evaluation of the penalty over several weights: its value, and each weight's gradient by name."""

    penalty: float
    weights: Mapping[str, Agreement]

    @property
    def overall(self) -> Agreement:
        """All gradients as one vector."""
        return sum(self.weights.values(), Agreement())

    @property
    def is_zero(self) -> bool:
        """Whether the penalty and every entry of every gradient are exactly 0."""
        return self.penalty == 0.0 and all(agreement.size == 0.0 for agreement in self.weights.values())


def violations(measurement: Measurement, form: AnchorForm, step: int) -> list[str]:
    """Describe the violations of the numeric contract after ``step`` optimizer steps.

    At step 0 the penalty and the gradient are exactly 0. Later, every single weight's gradient and all of them as
    one vector have a cosine of at least 0.999 with float64 and a relative error of at most 0.01 (base form, from the
    first step) or 0.02 (block form, from step 10; before that nothing is promised).
    """
    if step == 0:
        penalty = [] if measurement.penalty == 0.0 else [f"penalty {measurement.penalty:.3e} instead of 0"]
        nonzero = {name: agreement.size for name, agreement in measurement.weights.items() if agreement.size != 0.0}
        return penalty + [f"{name}: gradient norm {math.sqrt(size):.3e} instead of 0" for name, size in nonzero.items()]
    if step < FIRST_STEP[form]:
        return []
    return [
        f"{name}: cosine {agreement.cosine:.6f}, relative error {agreement.relative_error:.5f} "
        f"instead of at least {MIN_COSINE} and at most {MAX_ERROR[form]}"
        for name, agreement in {**measurement.weights, "all weights": measurement.overall}.items()
        # The comparison is written so that NaN is a violation.
        if not (agreement.cosine >= MIN_COSINE and agreement.relative_error <= MAX_ERROR[form])
    ]
