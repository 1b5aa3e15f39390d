"""Time over the elements of a weight, over the rank and over the number of weights."""

from __future__ import annotations

from benchmarks.suites import measure
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.measure import Clock, RunCase
from benchmarks.suites.providers import providers

SUITE = "scaling"


def test_scaling(case: BenchCase, clock: Clock, run: RunCase) -> None:
    run(case, measure.enter(case, providers(clock.device, case.dtype, case.compiling), clock))
