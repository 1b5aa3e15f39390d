"""Writes result files line by line, so that a run that is cut short leaves its measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.reporting.results import Result


class Recorder:
    """Writes a run and its results to a new file.

    Raises:
        OSError: the file cannot be written, or it exists: figures of two runs do not belong into one file.
    """

    def __init__(self, path: Path, run: Mapping[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("x", encoding="utf-8")
        self._write_line(run)

    def write(self, results: Sequence[Result]) -> None:
        for result in results:
            self._write_line({"kind": "result", **asdict(result)})

    def _write_line(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
