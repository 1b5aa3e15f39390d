"""The measurements of a run as JSON, from which the documentation's table is written."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from .experiment import Comparison, Course, State
from .knowledge import KnowledgeScore
from .task import TaskScore
from .train import TrainingRun


def write_record(path: Path, facts: dict[str, Any], comparisons: dict[int, Comparison]) -> None:
    """Write ``facts`` about the run (versions, options, seconds) and the comparison of each seed to ``path``."""
    seeds = {str(seed): dataclasses.asdict(comparison) for seed, comparison in comparisons.items()}
    path.write_text(json.dumps({"run": facts, "seeds": seeds}, indent=1) + "\n", encoding="utf-8")


def read_record(path: Path) -> tuple[dict[str, Any], dict[int, Comparison]]:
    """Read what :func:`write_record` wrote."""
    content = json.loads(path.read_text(encoding="utf-8"))
    return content["run"], {int(seed): _comparison(record) for seed, record in content["seeds"].items()}


def _comparison(record: dict[str, Any]) -> Comparison:
    courses = {
        name: Course(TrainingRun(**course["run"]), [_state(state) for state in course["states"]])
        for name, course in record["courses"].items()
    }
    return Comparison(_state(record["before"]), courses)


def _state(record: dict[str, Any]) -> State:
    return State(**{**record, "task": TaskScore(**record["task"]), "knowledge": KnowledgeScore(**record["knowledge"])})
