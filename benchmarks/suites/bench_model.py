"""All weights of a model, or as many of its layers as memory holds."""

from __future__ import annotations

from benchmarks.suites import measure
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.measure import Clock, RunCase
from benchmarks.suites.providers import providers

SUITE = "model"


def test_model(case: BenchCase, clock: Clock, run: RunCase) -> None:
    run(case, measure.enter(case, providers(clock.device, case.dtype, case.compiling), clock))
