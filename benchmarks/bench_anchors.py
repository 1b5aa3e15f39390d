"""Making anchors: seconds a matrix and captured energy, against the decompositions that torch offers."""

from __future__ import annotations

import subspaces
from cases import Case
from measure import Clock, Run

SUITE = "anchors"


def test_anchors(case: Case, clock: Clock, run: Run) -> None:
    run(case, subspaces.enter(case, clock))
