"""How the time grows with the elements of a weight, with the rank and with the number of weights."""

from __future__ import annotations

import measure
from cases import Case
from measure import Clock, Run
from providers import providers

SUITE = "scaling"


def test_scaling(case: Case, clock: Clock, run: Run) -> None:
    run(case, measure.enter(case, providers(clock.device, case.dtype, case.compiling), clock))
