"""All weights of a model, or as many of its layers as memory holds."""

from __future__ import annotations

import measure
from cases import Case
from measure import Clock, Run
from providers import providers

SUITE = "model"


def test_model(case: Case, clock: Clock, run: Run) -> None:
    run(case, measure.enter(case, providers(clock.device, case.dtype, case.compiling), clock))
