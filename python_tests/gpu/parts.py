"""A test run in parts: each is a process with a time limit and a log of its own, and one that fails stops no other."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The status of a command that has nothing to do here; its last line says why.
SKIPPED = 77
# Seconds that a terminated process has to say how far it came.
_GRACE = 8.0
_POLL = 0.1
Result = Literal["passed", "failed", "timed out", "stopped", "skipped"]


@dataclass(frozen=True)
class Part:
    """One command. ``limit``: its seconds. ``alone``: it begins when all parts before it have ended, and none begins
    before it has. ``counted``: it writes a JUnit file, named by ``{report}`` in its command. ``quoted``: all that it
    prints belongs into the summary.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    alone: bool = False
    counted: bool = False
    quoted: bool = False
    environment: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Counts:
    """The counts of a JUnit file, and the reasons why tests were skipped."""

    passed: int
    failed: int
    skipped: int
    reasons: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Outcome:
    """The result of a part; ``note`` is the last line that it printed."""

    part: Part
    result: Result
    seconds: float
    log: Path
    note: str = ""
    counts: Counts | None = None

    @property
    def wrong(self) -> bool:
        return self.result not in ("passed", "skipped")


def run_parts(parts: Sequence[Part], folder: Path, lanes: int = 3, report: Callable[[Outcome], None] = print) -> bool:
    """Run every part, at most ``lanes`` at a time; their logs go to ``folder``, each outcome to ``report`` as it comes.

    SIGINT or SIGTERM ends what runs, and the rest is reported as stopped.

    Returns:
        Whether every part passed or had nothing to do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()
    wrong: list[Outcome] = []
    telling = threading.Lock()

    def one(part: Part) -> None:
        outcome = run_part(part, folder, stop)
        with telling:
            wrong.extend([outcome] if outcome.wrong else [])
            report(outcome)

    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for group in _groups(parts):
            with ThreadPoolExecutor(lanes) as pool:
                for _ in pool.map(one, group):
                    pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return not wrong


def _groups(parts: Sequence[Part]) -> Iterator[list[Part]]:
    """Parts that may run side by side, in order."""
    group: list[Part] = []
    for part in parts:
        if part.alone and group:
            yield group
            group = []
        group.append(part)
        if part.alone:
            yield group
            group = []
    if group:
        yield group


def run_part(part: Part, folder: Path, stop: threading.Event) -> Outcome:
    """Run one part to its end, its limit, or until ``stop`` is set."""
    log, report = (folder / f"{part.name.replace(' ', '-')}.{suffix}" for suffix in ("log", "xml"))
    report.unlink(missing_ok=True)
    log.write_text("")
    if stop.is_set():
        return Outcome(part, "stopped", 0.0, log, "was not begun")
    began = time.monotonic()
    command = [word.format(report=report) if part.counted else word for word in part.command]
    with log.open("w") as output:
        try:
            # A session of its own: what the part has started ends with it.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **dict(part.environment)},
                start_new_session=True,
            )
        except OSError as error:
            output.write(f"{command[0]}: {error.strerror}\n")
            process = None
    result: Result = "failed" if process is None else _wait(process, began + part.limit, stop)
    seconds = time.monotonic() - began
    counts = read_counts(report) if part.counted else None
    if part.counted and counts is None and result == "passed":
        # It ended well without a count, so that nothing it says can be trusted.
        result = "failed"
    return Outcome(part, result, seconds, log, last_line(log), counts)


def _wait(process: subprocess.Popen[bytes], deadline: float, stop: threading.Event) -> Result:
    while True:
        try:
            code = process.wait(_POLL)
        except subprocess.TimeoutExpired:
            if stop.is_set() or time.monotonic() > deadline:
                _end(process)
                return "stopped" if stop.is_set() else "timed out"
            continue
        _kill(process, signal.SIGKILL)
        return "passed" if code == 0 else "skipped" if code == SKIPPED else "failed"


def _end(process: subprocess.Popen[bytes]) -> None:
    """First politely, so that it tells what it has found so far."""
    process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE)
    _kill(process, signal.SIGKILL)
    process.wait()


def _kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def last_line(log: Path) -> str:
    """The last line of a log that says something; "" where there is none."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")


def read_counts(report: Path) -> Counts | None:
    """The counts of a JUnit file; None if it cannot be read."""
    try:
        root = ElementTree.parse(report).getroot()
    except (OSError, ElementTree.ParseError):
        return None
    total: Counter[str] = Counter()
    for suite in root.iter("testsuite"):
        for name in ("tests", "failures", "errors", "skipped"):
            total[name] += int(suite.get(name, "0"))
    reasons = Counter(skip.get("message", "") for skip in root.iter("skipped"))
    failed = total["failures"] + total["errors"]
    return Counts(total["tests"] - failed - total["skipped"], failed, total["skipped"], tuple(sorted(reasons.items())))


# -- reporting ---------------------------------------------------------------------------------------------

HEAD = f"{'part':<26}{'result':<11}{'passed':>7}{'failed':>7}{'skipped':>8}{'seconds':>9}{'limit':>7}"


def row(outcome: Outcome) -> str:
    """One line of the table."""
    counts = outcome.counts
    numbers = ("", "", "") if counts is None else (counts.passed, counts.failed, counts.skipped)
    line = f"{outcome.part.name:<26}{outcome.result:<11}{numbers[0]:>7}{numbers[1]:>7}{numbers[2]:>8}"
    line += f"{outcome.seconds:>9.1f}{outcome.part.limit:>7.0f}"
    return line if counts is not None or not outcome.note else f"{line}  {outcome.note[:110]}"


def summary(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The table, why tests were skipped, and the end of each log of what went wrong."""
    lines: list[str] = []
    for outcome in outcomes:
        if outcome.part.quoted:
            lines += [outcome.log.read_text(errors="replace").rstrip(), ""]
    for outcome in outcomes:
        if outcome.wrong:
            text = outcome.log.read_text(errors="replace").rstrip().splitlines()
            lines += [f"---- {outcome.part.name}: {outcome.result}; the end of {outcome.log}", *text[-40:], ""]
    lines += [HEAD, *(row(outcome) for outcome in outcomes), ""]
    for outcome in outcomes:
        for reason, number in outcome.counts.reasons if outcome.counts else ():
            lines.append(f"skipped, {outcome.part.name}: {number} x {reason}")
    wrong = [outcome.part.name for outcome in outcomes if outcome.wrong]
    verdict = f"wrong: {', '.join(wrong)}" if wrong else "all right"
    lines.append(f"{len(outcomes)} parts in {seconds:.0f} s: {verdict}")
    return "\n".join(lines)


def python(*arguments: str) -> tuple[str, ...]:
    """A command of this Python."""
    return (sys.executable, *arguments)


def python_path(root: Path, variables: Mapping[str, str] = os.environ) -> str:
    """PYTHONPATH with the working tree first: a run installs nothing, and no installed package may hide the tree."""
    return os.pathsep.join([str(root), *filter(None, [variables.get("PYTHONPATH")])])
