"""Describes the machine and the versions of a measurement, and names the file of its figures.

python -m benchmarks.suites.machine [--device auto|cpu|cuda]

Prints the default result file; refuses, with status 2, a device that is not there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.reporting.results import SCHEMA
from rpsft_kernels.ops import native

DEVICES = ("auto", "cpu", "cuda")
_ROOT = Path(__file__).parents[2]
_COPIES = 7


def choose_device(name: str) -> torch.device:
    """Return the device of an option.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        built = "" if torch.version.cuda or torch.version.hip else f" (torch {torch.__version__} is a CPU build)"
        raise ValueError(f"device: got 'cuda', but torch sees no GPU{built}; use 'cpu' or 'auto'")
    return torch.device(name)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{processor()}, {os.cpu_count()} processors"


def default_output(device: torch.device) -> Path:
    """Name a new file for every run, below output/bench/."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return _ROOT / "output" / "bench" / f"{datetime.now():%Y-%m-%d-%H%M%S}-{slug}.jsonl"


def instruction_set() -> str | None:
    try:
        return native.instruction_set()
    except ValueError:
        return None


def _run_command(*command: str) -> str | None:
    """Return the output of a command; None where it does not run."""
    try:
        completed = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return completed.stdout.strip()


def clocks(device: torch.device) -> str:
    """Describe the clock rates, as far as the machine reports them."""
    if device.type == "cuda":
        fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        rates = _run_command(
            "nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"
        )
        return f"{fields}: {rates}" if rates else "unknown"
    folder = Path("/sys/devices/system/cpu/cpu0/cpufreq")
    try:
        governor = (folder / "scaling_governor").read_text(encoding="ascii").strip()
        highest = int((folder / "scaling_max_freq").read_text(encoding="ascii")) // 1000
    except (OSError, ValueError):
        return "unknown"
    return f"governor {governor}, up to {highest} MHz"


def versions() -> dict[str, str | None]:
    by_name: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "rpsft_kernels", "numpy"):
        try:
            by_name[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            by_name[name] = None
    return by_name


def measure_bandwidth(device: torch.device) -> float:
    """Measure the bytes per second of a copy that no cache holds, reads and writes both counted; median of several."""
    size = (1 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    rates = []
    for _ in range(_COPIES + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rates.append(2 * size / (time.perf_counter() - start))
    # The first copy maps the pages.
    return statistics.median(rates[1:])


def describe_run(device: torch.device, command: str | None = None) -> dict[str, Any]:
    """Return the first line of a result file."""
    commit = _run_command("git", "rev-parse", "HEAD")
    return {
        "kind": "run",
        "schema": SCHEMA,
        "device": device_name(device),
        "device_type": device.type,
        "clocks": clocks(device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "isa": instruction_set(),
        "commit": commit or "unknown",
        "dirty": bool(_run_command("git", "status", "--porcelain", "--untracked-files=no")),
        "command": command or shlex.join(["python", *sys.orig_argv[1:]]),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
        "bandwidth_bytes_per_second": measure_bandwidth(device),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Print the result file of a benchmark that starts now.")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    arguments = parser.parse_args(argv)
    try:
        device = choose_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))
    print(os.path.relpath(default_output(device)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
