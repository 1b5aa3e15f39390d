"""Making anchors: seconds a matrix and captured energy, against the decompositions that torch offers."""

from __future__ import annotations

from benchmarks.suites import subspaces
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.measure import Clock, RunCase

SUITE = "anchors"


def test_anchors(case: BenchCase, clock: Clock, run: RunCase) -> None:
    run(case, subspaces.enter(case, clock))
