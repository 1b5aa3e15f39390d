"""The cases of the quick self-test one after another, where the self-test itself broke off: what one that hangs hides.

    python python_tests/gpu/alone.py [seconds]

A process runs them in turn. After a case that hangs, or ends the process, another one goes on with the next. Exit
status 77 where the self-test has passed, for then nothing is hidden; 1 where a case fails, hangs or is not reached.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from rpsft_kernels.ops.selftest import record, subjects, suite
from rpsft_kernels.ops.selftest.cases import SelfTestCase
from rpsft_kernels.ops.selftest.checks import Subject
from rpsft_kernels.ops.triton.waiting import wait_for_stream

SKIPPED = 77
# Seconds that a launch may take, and a whole case, its kernels' compilation included, before its process is ended.
PATIENCE, CASE = 8.0, 45.0
BEGINS, ENDS = "case ", "  -> "


class Impatient(Subject):
    """A backend that is not waited for as long as a user's GPU is, which others may use too."""

    def settle(self) -> None:
        if self.device.type == "cuda":
            wait_for_stream(self.device, PATIENCE)


def run_cases(cases: Sequence[SelfTestCase], first: int, subject: Subject) -> None:
    """Run the cases from number ``first`` on, and end this process at one that hangs."""
    for number, case in enumerate(cases[first:], first):
        # Threads of C end a process that waits for the driver; Python's own cannot.
        faulthandler.dump_traceback_later(CASE, exit=True, file=2)
        print(f"{BEGINS}{number} of {len(cases)}: {case}", flush=True)
        result = suite.run(subject, [case], complete=False, repeats=4)
        print(f"{ENDS}{'ok' if result.passed else result.failures[-1]}", flush=True)
        if result.notes:
            # It hangs, or an error has left the GPU unusable for this process.
            os._exit(1)
    faulthandler.cancel_dump_traceback_later()


def survey(command: Callable[[int], Sequence[str]], seconds: float) -> list[str]:
    """Run the cases in as many processes as it takes.

    Args:
        command: the command of a process that begins with a case.
        seconds: after which nothing more is waited for.

    Returns:
        What is wrong, a line each.
    """
    deadline = time.monotonic() + seconds
    wrong: list[str] = []
    first, total = 0, 1
    while first < total:
        lines, code = _run(command(first), deadline)
        begun = [line.removeprefix(BEGINS) for line in lines if line.startswith(BEGINS)]
        ended = [line.removeprefix(ENDS) for line in lines if line.startswith(ENDS)]
        if not begun:
            return [*wrong, f"no case began: {lines[-1] if lines else f'status {code}'}"]
        first, total = first + len(begun), int(begun[-1].split()[2].rstrip(":"))
        wrong += [f"{case}: {verdict}" for case, verdict in zip(begun, ended, strict=False) if verdict != "ok"]
        if len(ended) < len(begun):
            wrong.append(f"{begun[-1]}: its process ended with status {code} in the middle of it")
        elif code == 0:
            break
        if first < total and time.monotonic() > deadline:
            wrong.append(f"{total - first} of {total} cases were not reached")
            break
    return wrong


def _run(command: Sequence[str], deadline: float) -> tuple[list[str], int]:
    """Run a process to its end or to the deadline; returns its lines, which are printed too, and its status."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    # Reading ends where the process does.
    before = signal.signal(signal.SIGALRM, lambda *_: process.kill())
    signal.setitimer(signal.ITIMER_REAL, max(0.01, deadline - time.monotonic()))
    lines = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(line, end="", flush=True)
        return lines, process.wait()
    finally:
        process.kill()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main(arguments: Sequence[str]) -> int:
    device = torch.device("cuda", 0)
    if arguments[:1] == ["from"]:
        (job,) = subjects.list_jobs(device, quick=True)[0]
        run_cases(job.cases, int(arguments[1]), Impatient(job.subject.backend, device))
        return 0
    if record.when_passed(record.collect_facts(device)) is not None:
        print("the quick self-test has passed: no case hides another")
        return SKIPPED
    seconds = float(arguments[0]) if arguments else float("inf")
    here = str(Path(__file__).resolve())
    wrong = survey(lambda first: [sys.executable, here, "from", str(first)], min(seconds, 3600.0))
    print("\n".join([*wrong, f"{len(wrong)} cases hang or fail"]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
