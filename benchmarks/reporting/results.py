"""A run of the benchmarks, its results by case, and the figures that are computed from their rounds."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal, get_args

SCHEMA = 1
Suite = Literal["layer", "model", "scaling", "anchors"]
Role = Literal["ours", "gemm", "published", "plain", "reference"]
Status = Literal["timed", "wrong", "not run"]
# In the order of a session, so that a run that is cut short has the most important suites.
SUITES: tuple[Suite, ...] = get_args(Suite)
VERSIONS = ("python", "torch", "triton", "rpsft_kernels", "numpy")


@dataclass(frozen=True)
class BenchmarkRun:
    """The machine, the versions and the command of a run.

    Attributes:
        bandwidth: in bytes per second, as measured; 0 where it was not measured.
        isa: instruction set of the CPU engine; None where it was not built or does not matter.
        load: load of the machine before the run.
        started: in UTC where the file has no zone.
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
        axis, x: the quantity that the scaling suite varies, and its value.
        why: the reason of a status other than "timed".
        seconds: the duration of each round; empty unless ``status`` is "timed".
        flops: the necessary operations.
        bytes: the bytes that a step has to move.
        error: relative error of the gradient against float64 at the relative drift ``drift``; in the suite "anchors"
            the share of the best possible energy that is lacking. Not finite where the gradient was not.
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
        """Median duration in seconds.

        Raises:
            statistics.StatisticsError: the provider was not timed.
        """
        return statistics.median(self.seconds)

    @property
    def gradient_error(self) -> float | None:
        return None if self.suite == "anchors" else self.error

    @property
    def lost_energy(self) -> float | None:
        """Share of the best possible energy that an anchor lacks."""
        return self.error if self.suite == "anchors" else None

    @property
    def form(self) -> str:
        """ "block" where the provider's name says so, else "base"."""
        return "block" if re.search(r"\bblock\b", self.provider, re.IGNORECASE) else "base"

    @property
    def accumulates(self) -> bool:
        """Whether the gradient is added in place: it is, unless the provider's name says that autograd is used."""
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
        """The fastest timed provider of this package: of those in base form that accumulate, where one was timed."""
        return self.fastest("ours", "base") or self.fastest("ours")

    def fastest(self, role: str, form: str | None = None) -> Result | None:
        """Find the timed provider of ``role`` with the least median; with ``form``, among its accumulating ones."""
        candidates = [
            result
            for result in self.results
            if result.timed and result.role == role and (form is None or (result.form == form and result.accumulates))
        ]
        return min(candidates, key=lambda result: result.median, default=None)


@dataclass(frozen=True)
class ResultFile:
    path: Path
    run: BenchmarkRun
    results: tuple[Result, ...]

    @property
    def cases(self) -> list[CaseResults]:
        """The cases, in the order in which each appears first."""
        grouped: dict[tuple[str, str], list[Result]] = {}
        for result in self.results:
            grouped.setdefault((result.suite, result.case), []).append(result)
        return [CaseResults(suite, name, tuple(results)) for (suite, name), results in grouped.items()]


def ratios(result: Result, reference: Result) -> list[float]:
    """Divide the time of ``result`` by that of ``reference``, round by round, as other load in a round hits both alike.

    Only rounds that both ran count; empty if one was not timed.
    """
    return [mine / theirs for mine, theirs in zip(result.seconds, reference.seconds, strict=False)]


def gemm_shares(result: Result, gemm: Result) -> list[float]:
    """Return the share of the rate of ``gemm`` that ``result`` has in each round; empty where it needs no products."""
    if not result.flops or not gemm.flops:
        return []
    work = result.flops / gemm.flops
    return [work / ratio for ratio in ratios(result, gemm)]


def bandwidth_shares(result: Result, run: BenchmarkRun) -> list[float]:
    """Return the necessary bytes per second as a share of the bandwidth, by round; empty where either is unknown."""
    if not result.bytes or not run.bandwidth:
        return []
    return [result.bytes / seconds / run.bandwidth for seconds in result.seconds]
