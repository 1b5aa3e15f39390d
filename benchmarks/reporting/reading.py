"""Reads and checks result files of the benchmarks: JSON lines.

The first line describes the run, every other line one provider in one case. Fields that this version does not know are
ignored; those it knows must all be there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, get_args

from benchmarks.reporting.results import SCHEMA, SUITES, VERSIONS, BenchmarkRun, Result, ResultFile, Role, Status

# Fields that the providers of one case have in common; dtype is not among them, as a provider may convert.
_CASE_FIELDS = ("model", "rank", "axis", "x")


@dataclass(frozen=True)
class _Kind:
    expected: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # A bool is an int in Python, but a flag in the place of a number is an error here.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_time(value: Any) -> bool:
    try:
        _parse_time(value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


def _parse_time(text: str) -> datetime:
    # Python 3.10 does not read a Z.
    moment = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=timezone.utc)


def _or_null(kind: _Kind) -> _Kind:
    return _Kind(f"{kind.expected} or null", lambda value: value is None or kind.accepts(value))


def _one_of(*choices: str) -> _Kind:
    return _Kind("one of " + ", ".join(map(repr, choices)), lambda value: isinstance(value, str) and value in choices)


_TEXT = _Kind("a string", lambda value: isinstance(value, str))
_NAME = _Kind("a string that is not empty", lambda value: isinstance(value, str) and value != "")
_COUNT = _Kind("a whole number of at least 0", _is_count)
_NUMBER = _Kind("a finite number", _is_finite)
_AT_LEAST_0 = _Kind("a finite number of at least 0", lambda value: _is_finite(value) and value >= 0)
# A wrong gradient may be NaN, and its file must be readable.
_MEASURED = _Kind("a number", _is_number)
_SHARE = _Kind("a number in [0, 1]", lambda value: _is_finite(value) and 0 <= value <= 1 + 1e-6)
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_ROUNDS = _Kind(
    "a list of positive finite numbers",
    lambda value: isinstance(value, list) and all(_is_finite(entry) and entry > 0 for entry in value),
)
_VERSIONS = _Kind(
    "an object with a string or null for each of " + ", ".join(VERSIONS),
    lambda value: (
        isinstance(value, dict)
        and all(name in value for name in VERSIONS)
        and all(version is None or isinstance(version, str) for version in value.values())
    ),
)

_RUN_FIELDS = {
    "schema": _Kind(str(SCHEMA), lambda value: _is_count(value) and value == SCHEMA),
    "device": _NAME,
    "device_type": _one_of("cpu", "cuda"),
    "clocks": _TEXT,
    "threads": _COUNT,
    "versions": _VERSIONS,
    "isa": _or_null(_TEXT),
    "commit": _TEXT,
    "dirty": _FLAG,
    "command": _TEXT,
    "started": _Kind("an ISO time", _is_time),
    "load": _NUMBER,
    "bandwidth_bytes_per_second": _AT_LEAST_0,
}
_RESULT_FIELDS = {
    "suite": _one_of(*SUITES),
    "case": _NAME,
    "model": _or_null(_TEXT),
    "rank": _COUNT,
    "dtype": _TEXT,
    "weights": _COUNT,
    "elements": _COUNT,
    "axis": _or_null(_NAME),
    "x": _or_null(_NUMBER),
    "provider": _NAME,
    "role": _one_of(*get_args(Role)),
    "status": _one_of(*get_args(Status)),
    "why": _TEXT,
    "seconds": _ROUNDS,
    "flops": _COUNT,
    "bytes": _COUNT,
    "error": _or_null(_MEASURED),
    "error_bound": _or_null(_AT_LEAST_0),
    "drift": _AT_LEAST_0,
    "penalty_at_anchor": _or_null(_MEASURED),
    "extra_bytes": _or_null(_COUNT),
    "launches": _or_null(_COUNT),
    "host_seconds": _or_null(_NUMBER),
    "energy": _or_null(_SHARE),
}


def load(path: Path | str) -> ResultFile:
    """Read the run and the results of a file.

    Raises:
        ValueError: a line is not valid; the message names file, line and field.
        OSError: ``path`` cannot be read.
    """
    path = Path(path)
    run: BenchmarkRun | None = None
    results: list[Result] = []
    # The line of each provider, which may come only once, and the first line of each case.
    providers: dict[tuple[str, str, str], int] = {}
    cases: dict[tuple[str, str], tuple[int, Result]] = {}
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    # splitlines would also cut at rarer characters, which a string may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _parse_row(line, where)
        expected = "result" if run is not None else "run"
        if row.get("kind") != expected:
            raise ValueError(f"{where}: field 'kind': got {row.get('kind')!r}, expected {expected!r}")
        if run is None:
            run = _parse_run(row, where)
            continue
        result = _parse_result(row, where)
        key = (result.suite, result.case, result.provider)
        if key in providers:
            raise ValueError(
                f"{where}: field 'provider': got {result.provider!r} again for case {result.case!r} of suite "
                f"{result.suite!r}, first on line {providers[key]}"
            )
        providers[key] = number
        first_line, first = cases.setdefault(key[:2], (number, result))
        for name in _CASE_FIELDS:
            if getattr(result, name) != getattr(first, name):
                raise ValueError(
                    f"{where}: field {name!r}: got {getattr(result, name)!r}, expected {getattr(first, name)!r} as on "
                    f"line {first_line} of the same case"
                )
        results.append(result)
    if run is None:
        raise ValueError(f"{path}:1: field 'kind': got an empty file, expected 'run'")
    return ResultFile(path, run, tuple(results))


def _parse_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON, cut off perhaps: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {type(row).__name__}, expected an object")
    return row


def _check(row: Mapping[str, Any], kinds: Mapping[str, _Kind], where: str) -> None:
    for name, kind in kinds.items():
        if name not in row:
            raise ValueError(f"{where}: field {name!r}: missing, expected {kind.expected}")
        if not kind.accepts(row[name]):
            raise ValueError(f"{where}: field {name!r}: got {row[name]!r}, expected {kind.expected}")


def _parse_run(row: Mapping[str, Any], where: str) -> BenchmarkRun:
    _check(row, _RUN_FIELDS, where)
    values = {field.name: row[field.name] for field in fields(BenchmarkRun) if field.name in row}
    values |= {"started": _parse_time(row["started"]), "bandwidth": row["bandwidth_bytes_per_second"]}
    return BenchmarkRun(**values)


def _parse_result(row: Mapping[str, Any], where: str) -> Result:
    _check(row, _RESULT_FIELDS, where)
    result = Result(**{**{name: row[name] for name in _RESULT_FIELDS}, "seconds": tuple(row["seconds"])})
    if result.timed != bool(result.seconds):
        expected = "at least one round" if result.timed else "none"
        raise ValueError(
            f"{where}: field 'seconds': got {len(result.seconds)} rounds with status {result.status!r}, "
            f"expected {expected}"
        )
    if (result.axis is None) != (result.x is None):
        raise ValueError(f"{where}: field 'x': got {result.x!r} with axis {result.axis!r}, expected both or neither")
    # No speed is reported for a wrong gradient. The comparison is written so that NaN is wrong.
    bound = result.error_bound
    if result.timed and result.role == "ours" and bound is not None and not (result.error or 0.0) <= bound:
        raise ValueError(
            f"{where}: field 'status': got 'timed' with error {result.error} above error_bound {bound}, "
            "expected 'wrong'"
        )
    return result
