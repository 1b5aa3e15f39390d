"""``make test-gpu``: what only a GPU can show; meant to take under four minutes on an H100, build included.

    python python_tests/gpu/run.py [--only NAME ...] [--without NAME ...] [--also-cpu-tests] [--list]

Runs with the Python, torch and Triton at hand and installs nothing into them: the native module is built inside the
working tree, and kernels that do not belong to its sources are compiled anew. Every part has a time limit and a log
in build/test-gpu, and runs whatever became of those before it. Exit status 1 if any went wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from parts import HEAD, Outcome, Part, python, python_path, row, run_parts, summary

ROOT = Path(__file__).parents[2]
HERE = Path("python_tests", "gpu")
LOGS = Path("build", "test-gpu")
# A kernel whose self-test failed must not hide what the other parts find: those ask for no self-test.
UNCHECKED = (("RPSFT_SELFTEST", "0"),)


def pytest_part(name: str, limit: float, *arguments: str) -> Part:
    command = python("-m", "pytest", *arguments, "-ra", "--dist", "loadgroup", "-p", "no:cacheprovider")
    # One module that cannot be imported must not keep the others from running.
    command += ("--continue-on-collection-errors",)
    # A test that hangs says where, before the part's limit ends it.
    command += ("-o", f"faulthandler_timeout={limit / 2:.0f}", "--durations=8", "--junitxml={report}")
    return Part(name, command, limit, counted=True, environment=UNCHECKED)


def sanitizer_part(tool: str) -> Part:
    # It begins no case after these seconds, and needs as many again to start.
    command = python(str(HERE / "sanitize.py"), tool, "25")
    return Part(tool, command, 100, environment=UNCHECKED)


def parts(cpu_tests: bool = False) -> list[Part]:
    """In order of worth: what is broken is found in the first seconds, and the rest is run all the same."""
    package = python("-m", "rpsft_kernels")
    found = [
        Part("native module", python(str(HERE / "prepare.py"), "native"), 240, alone=True),
        Part("kernels", python(str(HERE / "prepare.py"), "kernels"), 150, alone=True),
        Part("machine", (*package, "env"), 60, alone=True, quoted=True),
        # Longer than the self-test waits for a kernel that hangs: it names it.
        Part("quick self-test", (*package, "selftest", "--device", "cuda", "--quick"), 100, alone=True),
        Part("cases alone", python(str(HERE / "alone.py"), "120"), 140, alone=True),
        Part("self-test", (*package, "selftest", "--device", "cuda"), 150, alone=True),
        pytest_part("tests of GPUs", 150, str(HERE), "-n", "3"),
        pytest_part("tests of every device", 150, "python_tests", f"--ignore={HERE}", "--device-tests=only", "-n", "8"),
        *map(sanitizer_part, ("memcheck", "initcheck", "racecheck")),
    ]
    if cpu_tests:
        found.append(pytest_part("tests of CPUs", 600, "python_tests", "--device-tests=none", "-n", "8"))
    return found


def choose(options: argparse.Namespace) -> list[Part]:
    """The parts that the options select.

    Raises:
        ValueError: a name that no part has.
    """
    every = parts(options.also_cpu_tests)
    known = [part.name for part in every]
    for name in [*options.only, *options.without]:
        if name not in known:
            raise ValueError(f"got {name!r}, expected one of {', '.join(map(repr, known))}")
    return [part for part in every if part.name in (options.only or known) and part.name not in options.without]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this part; repeatable")
    parser.add_argument("--without", action="append", default=[], metavar="NAME", help="not this part; repeatable")
    parser.add_argument("--also-cpu-tests", action="store_true", help="also all other tests, on this machine's CPU")
    parser.add_argument("--list", action="store_true", help="name the parts and their commands")
    options = parser.parse_args(arguments)
    try:
        wanted = choose(options)
    except ValueError as error:
        parser.error(str(error))
    if options.list:
        for part in wanted:
            print(f"{part.name:<26}{part.limit:>4.0f} s  {' '.join(part.command)}")
        return 0
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"test-gpu runs with the torch at hand, and {sys.executable} has none ({error})") from None
    if not torch.cuda.is_available():
        raise SystemExit(
            f"test-gpu needs an NVIDIA GPU, and torch {torch.__version__} of {sys.executable} sees none; "
            "PYTHON names another Python: make test-gpu PYTHON=..."
        )
    os.chdir(ROOT)
    os.environ.update(PYTHONPATH=python_path(ROOT), PYTHONUNBUFFERED="1", OMP_NUM_THREADS="1")
    print(HEAD, flush=True)
    outcomes: list[Outcome] = []

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        print(row(outcome), flush=True)

    began = time.monotonic()
    right = run_parts(wanted, LOGS, lanes=4, report=report)
    print("\n" + summary(outcomes, time.monotonic() - began), flush=True)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
