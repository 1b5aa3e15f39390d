"""One layer's weights, all providers: the table that decides whether to adopt the package."""

from __future__ import annotations

from benchmarks.suites import measure
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.measure import Clock, RunCase
from benchmarks.suites.providers import providers

SUITE = "layer"


def test_layer(case: BenchCase, clock: Clock, run: RunCase) -> None:
    run(case, measure.enter(case, providers(clock.device, case.dtype, case.compiling), clock))
