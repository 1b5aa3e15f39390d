"""Result files of the benchmarks: JSON lines, read and checked; what is computed from their rounds; how it is printed.

The first line describes the run, every other line one provider in one case. Fields that this version does not know are
ignored; those it knows must all be there.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, get_args

SCHEMA = 1
Suite = Literal["layer", "model", "scaling", "anchors"]
Role = Literal["ours", "gemm", "published", "plain", "reference"]
Status = Literal["timed", "wrong", "not run"]
# In the order of a session: a run that is cut short has what matters most.
SUITES: tuple[Suite, ...] = get_args(Suite)
VERSIONS = ("python", "torch", "triton", "rpsft_kernels", "numpy")
# What the providers of one case have in common; dtype is not among them, a provider may convert.
_OF_THE_CASE = ("model", "rank", "axis", "x")


@dataclass(frozen=True)
class Run:
    """The machine, the versions and the command of a run.

    Attributes:
        bandwidth: measured, in bytes per second; 0 where it was not measured.
        isa: instruction set of the CPU engine; None where it was not built or does not matter.
        load: of the machine before the run.
        started: in UTC where the file says no zone.
    """

    device: str
    device_type: str
    clocks: str
    threads: int
    versions: Mapping[str, str | None]
    isa: str | None
    commit: str
    dirty: bool
    command: str
    started: datetime
    load: float
    bandwidth: float

    @property
    def commit_text(self) -> str:
        return f"{self.commit[:12]} (uncommitted changes)" if self.dirty else self.commit[:12]

    @property
    def versions_text(self) -> str:
        return ", ".join(f"{name} {version}" for name, version in self.versions.items() if version is not None)


@dataclass(frozen=True)
class Result:
    """One provider in one case.

    Attributes:
        case: unique within its suite.
        axis, x: what the scaling suite varies, and its value.
        why: the reason of a status other than "timed".
        seconds: of each round; empty unless ``status`` is "timed".
        flops: the necessary ones.
        bytes: that a step has to move.
        error: relative, of the gradient against float64 at the relative drift ``drift``; of anchors, how much of the
            best possible energy they lack. Not finite where the result was not.
        energy: share of the weights' squared norm that the anchors span, in [0, 1].
    """

    suite: str
    case: str
    model: str | None
    rank: int
    dtype: str
    weights: int
    elements: int
    axis: str | None
    x: float | None
    provider: str
    role: Role
    status: Status
    why: str
    seconds: tuple[float, ...]
    flops: int
    bytes: int
    error: float | None
    error_bound: float | None
    drift: float
    penalty_at_anchor: float | None
    extra_bytes: int | None
    launches: int | None
    host_seconds: float | None
    energy: float | None

    @property
    def timed(self) -> bool:
        return self.status == "timed"

    @property
    def median(self) -> float:
        """Seconds. Raises ``statistics.StatisticsError`` for a provider that was not timed."""
        return statistics.median(self.seconds)

    @property
    def gradient_error(self) -> float | None:
        return None if self.suite == "anchors" else self.error

    @property
    def lost_energy(self) -> float | None:
        """How much of the best possible energy an anchor lacks, relatively."""
        return self.error if self.suite == "anchors" else None

    @property
    def form(self) -> str:
        """ "block" where the provider's name says so, else "base"."""
        return "block" if re.search(r"\bblock\b", self.provider, re.IGNORECASE) else "base"

    @property
    def accumulates(self) -> bool:
        """Whether the gradient is added in place, which is so unless the provider's name says that autograd is used."""
        autograd = r"autograd|differentiable|backward|rotation_penalty|in the loss"
        return re.search(autograd, self.provider, re.IGNORECASE) is None


@dataclass(frozen=True)
class CaseResults:
    """The results of one case, in the order of the file."""

    suite: str
    name: str
    results: tuple[Result, ...]

    @property
    def gemm(self) -> Result | None:
        """The machine's own products, if they were timed."""
        return next((result for result in self.results if result.role == "gemm" and result.timed), None)

    @property
    def ours(self) -> Result | None:
        """The fastest timed provider of this package: in base form and accumulating, where one of these was timed."""
        return self.fastest("ours", "base") or self.fastest("ours")

    def fastest(self, role: str, form: str | None = None) -> Result | None:
        """The timed provider of ``role`` with the smallest median; with ``form``, among the accumulating ones of it."""
        candidates = [
            result
            for result in self.results
            if result.timed and result.role == role and (form is None or (result.form == form and result.accumulates))
        ]
        return min(candidates, key=lambda result: result.median, default=None)


@dataclass(frozen=True)
class ResultFile:
    path: Path
    run: Run
    results: tuple[Result, ...]

    @property
    def cases(self) -> list[CaseResults]:
        """In the order in which each case appears first."""
        grouped: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            grouped.setdefault((result.suite, result.case), []).append(result)
        return [CaseResults(suite, name, tuple(results)) for (suite, name), results in grouped.items()]


def ratios(result: Result, reference: Result) -> list[float]:
    """Time of ``result`` over that of ``reference``, round by round: what else the machine did then hit both alike.

    Of two providers that ran different numbers of rounds, those that both ran; empty if one was not timed.
    """
    return [mine / theirs for mine, theirs in zip(result.seconds, reference.seconds, strict=False)]


def gemm_shares(result: Result, gemm: Result) -> list[float]:
    """Rate of ``result`` as a share of the rate of ``gemm``, round by round; empty where no products are necessary."""
    if not result.flops or not gemm.flops:
        return []
    work = result.flops / gemm.flops
    return [work / ratio for ratio in ratios(result, gemm)]


def bandwidth_shares(result: Result, run: Run) -> list[float]:
    """Necessary bytes per second as a share of the measured bandwidth, by round; empty where either is unknown."""
    if not result.bytes or not run.bandwidth:
        return []
    return [result.bytes / seconds / run.bandwidth for seconds in result.seconds]


# Reading


@dataclass(frozen=True)
class _Kind:
    expected: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    # bool is an int to Python, and a flag in the place of a number is an error to us.
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_time(value: Any) -> bool:
    try:
        _time(value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True


def _time(text: str) -> datetime:
    # Python 3.10 does not read the Z itself.
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
# A wrong gradient may be NaN, and its file has to be readable.
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
    """The run and the results of a file.

    Raises:
        ValueError: a line is not what it should be; file, line and field are named.
        OSError: ``path`` cannot be read.
    """
    path = Path(path)
    run: Run | None = None
    results: list[Result] = []
    # Of each provider and each case, where it was first said: a second saying is refused.
    providers: dict[tuple[str, str, str], int] = {}
    cases: dict[tuple[str, str], tuple[int, Result]] = {}
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error}") from error
    # Not splitlines: a string may hold one of the rarer characters that it takes for the end of a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = _row(line, where)
        expected = "result" if run is not None else "run"
        if row.get("kind") != expected:
            raise ValueError(f"{where}: field 'kind': got {row.get('kind')!r}, expected {expected!r}")
        if run is None:
            run = _run(row, where)
            continue
        result = _result(row, where)
        key = (result.suite, result.case, result.provider)
        if key in providers:
            raise ValueError(
                f"{where}: field 'provider': got {result.provider!r} again for case {result.case!r} of suite "
                f"{result.suite!r}, first on line {providers[key]}"
            )
        providers[key] = number
        first_line, first = cases.setdefault(key[:2], (number, result))
        for name in _OF_THE_CASE:
            if getattr(result, name) != getattr(first, name):
                raise ValueError(
                    f"{where}: field {name!r}: got {getattr(result, name)!r}, expected {getattr(first, name)!r} as on "
                    f"line {first_line} of the same case"
                )
        results.append(result)
    if run is None:
        raise ValueError(f"{path}:1: field 'kind': got an empty file, expected 'run'")
    return ResultFile(path, run, tuple(results))


def _row(line: str, where: str) -> dict[str, Any]:
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


def _run(row: Mapping[str, Any], where: str) -> Run:
    _check(row, _RUN_FIELDS, where)
    values = {field.name: row[field.name] for field in fields(Run) if field.name in row}
    return Run(**{**values, "started": _time(row["started"]), "bandwidth": row["bandwidth_bytes_per_second"]})


def _result(row: Mapping[str, Any], where: str) -> Result:
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
    # No speed is reported of a gradient that is wrong. Written so that NaN is wrong.
    bound = result.error_bound
    if result.timed and result.role == "ours" and bound is not None and not (result.error or 0.0) <= bound:
        raise ValueError(
            f"{where}: field 'status': got 'timed' with error {result.error} above error_bound {bound}, "
            "expected 'wrong'"
        )
    return result


# Printing


def digits_of(values: Iterable[float]) -> int:
    """Decimals that leave the median at least three significant digits, four at most behind the point."""
    middle = abs(statistics.median(values))
    return 0 if middle >= 100 else 1 if middle >= 10 else 2 if middle >= 1 else 3 if middle >= 0.1 else 4


def spread(values: Sequence[float], digits: int | None = None) -> str:
    """Median (min..max); "-" for none, and the value alone for one."""
    if not values:
        return "-"
    digits = digits_of(values) if digits is None else digits
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def times_text(result: Result) -> str:
    """Milliseconds, or why there are none."""
    if result.timed:
        return spread([1e3 * seconds for seconds in result.seconds])
    if result.status == "wrong":
        bound = "" if result.error_bound is None else f", bound {result.error_bound:.2g}"
        error = "" if result.error is None else f": error {result.error:.2g}{bound}"
        return f"not timed{error}" + (f" ({result.why})" if result.why else "")
    return f"not run: {result.why}" if result.why else "not run"


def ratio_text(values: Sequence[float]) -> str:
    """The median of ratios, with an x; "-" for none."""
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{middle:.{0 if middle >= 100 else 1 if middle >= 10 else 2}f}x"


def rate_text(flops: float, seconds: float) -> str:
    """Operations per second, with their unit."""
    if not flops:
        return "-"
    rate = flops / seconds / 1e9
    # Above, four digits would say more than the spread allows.
    value, unit = (rate, "GFLOP/s") if rate < 1000 else (rate / 1000, "TFLOP/s")
    return f"{value:.{min(digits_of([value]), 2)}f} {unit}"


def memory_text(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:.{1 if count < 100 * 2**20 else 0}f}"


def number_text(value: float | None, digits: int = 2) -> str:
    """Significant digits; "-" for None."""
    return "-" if value is None else f"{value:.{digits}g}"
