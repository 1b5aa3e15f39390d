"""Runs sanitized.py under one of compute-sanitizer's tools and tells reports of this package's kernels from others'.

    python python_tests/gpu/sanitize.py memcheck [seconds]

Exit status 1 where one of this package's kernels is reported, or the program itself failed; 77 where the tool is not
installed. PyTorch's own kernels are reported at times (initcheck): this is counted and printed, and is no failure.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = 77
HERE = Path(__file__).resolve().parent
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "initcheck": [], "synccheck": []}
# The place of a toolkit that is not on the PATH.
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")
# The tool ends with this status after a report about a kernel, and with another one after any other failure.
_REPORTED = 9
# PyTorch has a reduce_kernel too, inside a namespace and with template arguments.
_OURS = re.compile(
    r"(?<![\w:])(?:(?:hopper_)?(?:project|pull|gradient)|drift|reduce|squares|round|full_drift|full_gradient)_kernel(?![\w<])"
)
_SITE = re.compile(r"\b(?:at|by|in) (.+?)(?:\+0x[0-9a-f]+|$)")


@dataclass(frozen=True)
class Report:
    """One report: its first line, and the kernel that it names ("" where it names none)."""

    text: str
    kernel: str
    ours: bool


def parse_reports(lines: Iterable[str]) -> Iterator[Report]:
    """The reports in a tool's output: lines begin with "=========", those that continue a report are indented."""
    block: list[str] = []
    for line in [*lines, "========= end"]:
        if not line.startswith("========="):
            continue
        text = line.removeprefix("=========").rstrip()
        if text.startswith("     ") and block:
            block.append(text.strip())
            continue
        if block and _is_report(block):
            yield _report(block)
        block = [text.strip()] if text.strip() else []


def _is_report(block: Sequence[str]) -> bool:
    # Lines that frame the run ("COMPUTE-SANITIZER", "ERROR SUMMARY: ...", "RACECHECK SUMMARY: ...") stand alone.
    return not re.match(r"COMPUTE-SANITIZER|\w+ SUMMARY|Target application|end$", block[0])


def _report(block: Sequence[str]) -> Report:
    # Behind the site comes the host's stack, which names no kernel that runs.
    head = []
    for text in block:
        if text.startswith(("Saved host backtrace", "Host Frame")):
            break
        head.append(text)
    whole = " ".join(head)
    own = _OURS.search(whole)
    site = own[0] if own else next((found[1] for text in head if (found := _SITE.search(text))), "")
    return Report(block[0], site, own is not None)


def describe(reports: Sequence[Report]) -> list[str]:
    """Lines to print: how often each kernel was reported, and its first report."""
    counts = Counter((report.ours, report.kernel) for report in reports)
    first = {(report.ours, report.kernel): report.text for report in reversed(reports)}
    return [
        f"{'this package' if ours else 'others'}: {number} x {kernel or 'no kernel'}: {first[ours, kernel]}"
        for (ours, kernel), number in sorted(counts.items(), reverse=True)
    ]


def find_sanitizer() -> str | None:
    """compute-sanitizer's path; None where there is none."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(_PLACES))


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] not in TOOLS:
        raise SystemExit(f"tool: got {arguments[:1]}, expected one of {', '.join(TOOLS)}")
    tool, seconds = arguments[0], arguments[1:]
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print(f"compute-sanitizer is not installed here: no {tool}")
        return SKIPPED
    command = [sanitizer, "--tool", tool, *TOOLS[tool], "--error-exitcode", str(_REPORTED), "--print-limit", "20000"]
    command += [sys.executable, str(HERE / "sanitized.py"), *seconds]
    # Without PyTorch's cache each tensor is an allocation of its own: reads beside it are seen.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "RPSFT_SELFTEST": "0"}
    paths = [str(HERE.parents[1]), str(HERE.parent / "helpers"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    run = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []
    assert run.stdout is not None
    for line in run.stdout:
        lines.append(line)
        print(line, end="", flush=True)
    code = run.wait()
    all_reports = list(parse_reports(lines))
    ours = sum(report.ours for report in all_reports)
    print(*describe(all_reports), sep="\n")
    ran = next((line.strip() for line in reversed(lines) if "cases ran" in line), "")
    others = len(all_reports) - ours
    print(f"{tool}: {ours} reports of this package's kernels, {others} of others; {ran or 'it broke off'}")
    return 0 if ours == 0 and ran and code in (0, _REPORTED) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
