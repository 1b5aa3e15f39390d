"""One layer's weights, all providers: the table that decides whether to adopt the package."""

from __future__ import annotations

import measure
from cases import Case
from measure import Clock, Run
from providers import providers

SUITE = "layer"


def test_layer(case: Case, clock: Clock, run: Run) -> None:
    run(case, measure.enter(case, providers(clock.device, case.dtype, case.compiling), clock))
