"""``make test-gpu`` without a GPU: its parts and their table, its builds, the output of a sanitizer."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import alone
import filling
import parts
import prepare
import run
import sanitize
import sanitized
from alone import Impatient
from filling import Case, findings, make_inputs
from parts import Counts, Outcome, Part, run_part, run_parts
from rpsft_kernels.ops.selftest.cases import quick_cases
from rpsft_kernels.ops.triton import toolchain
from rpsft_kernels.ops.triton.aot.targets import BY_CAPABILITY
from rpsft_kernels.ops.triton.waiting import PATIENCE

HERE = Path(run.__file__).parent
FINDS = "import sys, time, pathlib; here = pathlib.Path(sys.argv[1])\n"
# Waits for a file that another part writes; its limit ends it where that part never runs beside it.
MEETS = FINDS + "(here / sys.argv[2]).touch()\nwhile not (here / sys.argv[3]).exists(): time.sleep(0.01)"


def part(name: str, program: str, *arguments: str | Path, limit: float = 60, **options: Any) -> Part:
    return Part(name, (sys.executable, "-c", program, *map(str, arguments)), limit, **options)


def outcomes_of(wanted: list[Part], folder: Path, **options: Any) -> tuple[bool, dict[str, Outcome]]:
    found: dict[str, Outcome] = {}
    right = run_parts(wanted, folder, report=lambda outcome: found.update({outcome.part.name: outcome}), **options)
    return right, found


# -- parts -------------------------------------------------------------------------------------------------


def test_whatever_goes_wrong_the_rest_runs(tmp_path: Path) -> None:
    wanted = [
        part("good", "print('all is well')", alone=True),
        part("bad", "raise SystemExit('it is broken')", alone=True),
        part("slow", "import time; print('begun', flush=True); time.sleep(600)", limit=1.5, alone=True),
        part("nothing to do", "print('no such tool here'); raise SystemExit(77)", alone=True),
        Part("missing", (str(tmp_path / "missing"),), 60, alone=True),
        part("last", "print('still here')", alone=True),
    ]
    right, found = outcomes_of(wanted, tmp_path)
    assert not right and list(found) == [each.name for each in wanted]
    assert {name: outcome.result for name, outcome in found.items()} == {
        "good": "passed",
        "bad": "failed",
        "slow": "timed out",
        "nothing to do": "skipped",
        "missing": "failed",
        "last": "passed",
    }
    assert found["good"].note == "all is well" and found["bad"].note == "it is broken"
    assert found["slow"].log.read_text().startswith("begun")
    assert found["missing"].note.endswith("missing: No such file or directory")
    text = parts.summary(list(found.values()), 3.0)
    assert "---- bad: failed; the end of" in text and "it is broken" in text and "---- good" not in text
    assert text.splitlines()[-1] == "6 parts in 3 s: wrong: bad, slow, missing"
    assert outcomes_of(wanted[3:4] + wanted[5:], tmp_path)[0]


def test_a_part_alone_has_the_others_before_and_behind_it(tmp_path: Path) -> None:
    writes, sees = FINDS + "(here / sys.argv[2]).touch()", FINDS + "sys.exit(not (here / sys.argv[2]).exists())"
    wanted = [
        part("first", FINDS + "time.sleep(0.5); (here / 'first').touch()", tmp_path),
        part(
            "alone", FINDS + "(here / 'alone').touch(); sys.exit(not (here / 'first').exists())", tmp_path, alone=True
        ),
        part("behind", sees, tmp_path, "alone"),
        part("behind too", writes, tmp_path, "x"),
    ]
    assert outcomes_of(wanted, tmp_path)[0]


def test_parts_run_side_by_side(tmp_path: Path) -> None:
    wanted = [part("one", MEETS, tmp_path, "a", "b"), part("other", MEETS, tmp_path, "b", "a")]
    assert outcomes_of(wanted, tmp_path, lanes=2)[0]


def test_what_a_part_has_started_ends_with_it(tmp_path: Path) -> None:
    starts = FINDS + textwrap.dedent("""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / "child").write_text(str(child.pid))
        time.sleep(float(sys.argv[2]))
    """)
    for seconds, expected in (("0", "passed"), ("600", "timed out")):
        outcome = run_part(part("parent", starts, tmp_path, seconds, limit=3), tmp_path, threading.Event())
        assert outcome.result == expected
        state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
        while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
            time.sleep(0.01)


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        textwrap.dedent("""
        import pytest
        def test_good(): pass
        def test_bad(): assert False, "that is wrong"
        @pytest.fixture
        def broken(): raise RuntimeError
        def test_error(broken): pass
        @pytest.mark.parametrize("i", [1, 2])
        def test_skipped(i): pytest.skip("for want of a GPU")
    """)
    )
    command = parts.python("-m", "pytest", str(tmp_path), "-p", "no:cacheprovider", "--junitxml={report}")
    outcome = run_part(Part("tests", command, 120, counted=True), tmp_path, threading.Event())
    assert outcome.result == "failed"
    assert outcome.counts == Counts(1, 2, 2, (("for want of a GPU", 2),))
    text = parts.summary([outcome], 1.0)
    assert "that is wrong" in text and "skipped, tests: 2 x for want of a GPU" in text
    assert parts.row(outcome).split()[1:5] == ["failed", "1", "2", "2"]


def test_a_count_that_is_missing_or_an_old_one_is_no_success(tmp_path: Path) -> None:
    (tmp_path / "tests.xml").write_text('<testsuites><testsuite tests="9" failures="0"/></testsuites>')
    wanted = part("tests", "print('1000 passed')", "{report}", counted=True)
    outcome = run_part(wanted, tmp_path, threading.Event())
    assert (outcome.result, outcome.counts) == ("failed", None)


def test_a_signal_ends_it_with_a_table(tmp_path: Path) -> None:
    program = textwrap.dedent("""
        import pathlib, sys
        from parts import Part, python, row, run_parts, summary
        slow = "import time; open('begun', 'w').close(); time.sleep(600)"
        wanted = [Part(name, python("-c", slow), 500, alone=True) for name in ("running", "waiting")]
        outcomes = []
        right = run_parts(wanted, pathlib.Path("logs"), report=outcomes.append)
        print(summary(outcomes, 1.0))
        sys.exit(not right)
    """)
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "begun").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "2 parts in 1 s: wrong: running, waiting" in said and "was not begun" in said


# -- the run -----------------------------------------------------------------------------------------------


def test_every_part_can_be_chosen_and_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    names = [each.name for each in run.parts()]
    assert names[:6] == ["native module", "kernels", "machine", "quick self-test", "cases alone", "self-test"]
    # The self-test names a kernel that hangs before its part ends it.
    assert all(each.limit > PATIENCE + 30 for each in run.parts() if each.name.endswith("self-test"))
    assert len({name.replace(" ", "-") for name in names}) == len(names)
    for each in run.parts(cpu_tests=True):
        assert all((run.ROOT / word).exists() for word in each.command if word.endswith(".py"))
    assert run.main(["--list", "--only", "memcheck", "--only", "kernels", "--without", "kernels"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["memcheck"]
    with pytest.raises(SystemExit):
        run.main(["--only", "memchek"])
    assert "got 'memchek', expected one of 'native module', 'kernels'" in capsys.readouterr().err


# Case 1 is wrong, 2 hangs, 4 ends its process and 6 does nothing for ever.
CASES = """
import os, sys, time
for number in range(int(sys.argv[1]), int(sys.argv[2])):
    print(f"case {number} of {sys.argv[2]}: number {number}", flush=True)
    if number == 4:
        os._exit(139)
    if number == 6:
        time.sleep(600)
    print("  -> " + {1: "wrong", 2: "hangs"}.get(number, "ok"), flush=True)
    if number == 2:
        os._exit(1)
"""


def test_a_case_that_hangs_hides_no_other() -> None:
    def survey(total: int, seconds: float) -> list[str]:
        return alone.survey(lambda first: [sys.executable, "-c", CASES, str(first), str(total)], seconds)

    wrong = ["1 of 6: number 1: wrong", "2 of 6: number 2: hangs"]
    wrong.append("4 of 6: number 4: its process ended with status 139 in the middle of it")
    assert survey(6, 60) == wrong
    assert survey(1, 60) == []
    assert survey(3, 60)[-1] == "2 of 3: number 2: hangs"
    *first, ended, missed = survey(9, 4)
    assert len(first) == 3 and ended.startswith("6 of 9: number 6: its process ended with status -9")
    assert missed == "2 of 9 cases were not reached"
    broken = [sys.executable, "-c", "raise SystemExit('no module named so')"]
    assert alone.survey(lambda _: broken, 60) == ["no case began: no module named so"]


def test_cases_alone_print_what_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    """On plain PyTorch, in place of kernels of a GPU."""
    cases = list(quick_cases((32,)))[:3]
    alone.run_cases(cases, 1, Impatient("torch", torch.device("cpu"), bitwise=False))
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"case 1 of 3: {cases[1]}", "  -> ok", f"case 2 of 3: {cases[2]}", "  -> ok"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"test-gpu needs an NVIDIA GPU, and torch .* sees none; PYTHON names another"):
        run.main([])


def test_device_tests_and_the_others_are_all() -> None:
    def collected(*options: str) -> set[str]:
        command = [sys.executable, "-m", "pytest", "--collect-only", "python_tests/ops/test_dispatch.py", *options]
        said = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
        return {line for line in said.splitlines() if "::" in line}

    only, none = collected("--device-tests=only"), collected("--device-tests=none")
    assert "python_tests/ops/test_dispatch.py::test_free_choice" in only and not only & none
    assert "python_tests/ops/test_dispatch.py::test_nested_choices_end_with_their_blocks" in none
    assert only | none == collected()


# -- what is built -----------------------------------------------------------------------------------------


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that would be run."""
    commands: list[str] = []

    def record(command: Sequence[str], _: Mapping[str, str]) -> int:
        commands.append(" ".join(command))
        return 0

    monkeypatch.setattr(prepare, "run", record)
    return commands


def with_triton(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    def found(name: str) -> str:
        if name == "triton" and not version:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    monkeypatch.setattr(toolchain, "triton_missing", lambda: None if version else "the package triton is not installed")


@pytest.mark.parametrize(
    ("version", "capability"), [("3.9.0", 90), ("3.10.1", 90), ("4.0.0+git1234", 90), ("3.6.0", 80), ("3.6.0", 120)]
)
def test_a_triton_that_is_right_compiles(
    version: str, capability: int, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_triton(monkeypatch, version)
    assert prepare.compiler(capability) == (sys.executable, "") and ran == []


@pytest.mark.parametrize(("version", "capability"), [("3.6.0", 90), ("3.8.1", 90), ("", 80)])
def test_another_triton_gets_an_environment_of_its_own(
    version: str, capability: int, ran: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_triton(monkeypatch, version)
    monkeypatch.setattr(prepare, "ENVIRONMENT", tmp_path / "environment")
    python = str(tmp_path / "environment" / "bin" / "python")
    assert prepare.compiler(capability) == (python, "")
    assert ran == [
        f"{sys.executable} -m venv {tmp_path / 'environment'}",
        f"{python} -m pip install -q --retries=1 --no-deps triton>=3.9",
    ]
    monkeypatch.setattr(prepare, "run", lambda command, _: "pip" in command)
    found, why = prepare.compiler(capability)
    have = f"Triton {version} is known to compile" if version else "the package triton is not installed"
    assert found == "" and why.startswith(have)
    assert why.endswith(", and -q --retries=1 --no-deps triton>=3.9 failed: see above")


def library(**changes: Any) -> SimpleNamespace:
    manifest = {"only": "", "left_out": [], **changes}
    return SimpleNamespace(
        manifest=manifest,
        generations=[BY_CAPABILITY[90]],
        arch_names=lambda: "sm_90a",
        summary=lambda: "a summary of kernels",
    )


def test_kernels_that_are_current_are_taken(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    monkeypatch.setattr("rpsft_kernels.ops.triton.aot.library.Library.open", lambda folder: library())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert prepare.kernels() == "" and ran == []
    assert prepare.stale(Path("kernels"), 80) == "the kernels in kernels are for sm_90a"
    monkeypatch.setattr("rpsft_kernels.ops.triton.aot.library.Library.open", lambda folder: library(only="pull*"))
    assert prepare.stale(Path("kernels"), 90) == "the kernels in kernels are a selection: pull*"
    lacking = [{"arch": "sm_90a", "label": "project(...)", "reason": "spills"}, {"arch": "sm_80"}]
    monkeypatch.setattr("rpsft_kernels.ops.triton.aot.library.Library.open", lambda folder: library(left_out=lacking))
    assert prepare.stale(Path("kernels"), 90) == "the kernels in kernels lack 1, such as project(...): spills"


def test_kernels_of_other_sources_are_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(folder: Path) -> SimpleNamespace:
        if not ran:
            raise ValueError("compiled from other sources")
        return library()

    with_triton(monkeypatch, "3.9.0")
    monkeypatch.setattr("rpsft_kernels.ops.triton.aot.library.Library.open", opened)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert prepare.kernels() == ""
    assert "compiling kernels for 9.0: compiled from other sources" in capsys.readouterr().out
    (command,) = ran
    assert command.startswith(f"{sys.executable} {prepare.COMPILE} --arch 9.0 --output ")


def test_where_nothing_can_compile_the_way_out_is_told(
    monkeypatch: pytest.MonkeyPatch, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def opened(folder: Path) -> SimpleNamespace:
        raise ValueError("this installation carries no kernels")

    monkeypatch.setattr("rpsft_kernels.ops.triton.aot.library.Library.open", opened)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(prepare, "compiler", lambda capability: ("", "the Triton at hand is 3.6.0, and pip failed"))
    assert prepare.main(["kernels"]) == 1
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith("no kernels can be compiled: the Triton at hand is 3.6.0, and pip failed; carry ")
    assert said.endswith('python -m rpsft_kernels kernels --build "9.0"')


def test_what_the_native_module_needs_is_named(monkeypatch: pytest.MonkeyPatch, ran: list[str]) -> None:
    assert prepare.native() == "" and "setup.py -q build_ext --inplace" in ran[0]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pybind11" else object())
    assert prepare.native() == (f"the native module's build needs pybind11: {sys.executable} -m pip install pybind11")


# -- the sanitizer -----------------------------------------------------------------------------------------

# Output of NVIDIA's tools as their manual shows it.
MEMCHECK = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at project_kernel+0x1f0
=========     by thread (32,0,0) in block (8,0,0)
=========     Access at 0x7f5e2a000200 is out of bounds
=========     Saved host backtrace up to driver entry point at kernel launch time
=========         Host Frame: gradient_kernel [0x2c1f]
=========
 12.0 s  base bfloat16
========= ERROR SUMMARY: 1 error
"""
INITCHECK = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at void at::native::reduce_kernel<(int)512, (int)1>(T3)+0x80
=========     by thread (0,0,0) in block (0,0,0)
=========     Access at 0x7f5e2a000204
========= Uninitialized __global__ memory read of size 4 bytes
=========     at gradient_kernel+0x9f0
=========     by thread (1,0,0) in block (8,0,0)
=========
========= ERROR SUMMARY: 2 errors
"""
RACECHECK = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at pull_kernel+0x180
=========     and Read access at pull_kernel+0x1c0 [496 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n"


@pytest.mark.parametrize(
    ("said", "kernels"),
    [
        (MEMCHECK, [("project_kernel", True)]),
        (INITCHECK, [("void at::native::reduce_kernel<(int)512, (int)1>(T3)", False), ("gradient_kernel", True)]),
        (RACECHECK, [("pull_kernel", True)]),
        (CLEAN, []),
    ],
)
def test_reports_are_told_apart_by_kernel(said: str, kernels: list[tuple[str, bool]]) -> None:
    assert [(report.kernel, report.ours) for report in sanitize.parse_reports(said.splitlines())] == kernels


def test_every_kernel_of_this_package_is_known() -> None:
    from rpsft_kernels.ops.triton.variants import ARGUMENTS

    for kernel in ARGUMENTS:
        said = f"========= Invalid __shared__ write of size 4 bytes\n=========     at {kernel}_kernel+0x10\n"
        (report,) = sanitize.parse_reports(said.splitlines())
        assert report.ours and report.kernel == f"{kernel}_kernel"


@pytest.mark.parametrize(
    ("said", "code", "status", "verdict"),
    [
        (CLEAN + "45 of 45 cases ran\n", 0, 0, "0 reports of this package's kernels, 0 of others; 45 of 45 cases ran"),
        (INITCHECK + "9 of 45 cases ran\n", 9, 1, "1 reports of this package's kernels, 1 of others; 9 of 45 cases"),
        (INITCHECK.replace("gradient_kernel", "other") + "9 of 45 cases ran\n", 9, 0, "0 reports of this"),
        (CLEAN, 1, 1, "0 of others; it broke off"),
        (CLEAN + "45 of 45 cases ran\n", 255, 1, "45 of 45 cases ran"),
    ],
)
def test_the_tools_verdict(
    said: str,
    code: int,
    status: int,
    verdict: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "said").write_text(said)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\ncat {tmp_path}/said\nexit {code}\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert sanitize.main(["initcheck", "20"]) == status
    assert verdict in capsys.readouterr().out.splitlines()[-1]
    asked = (tmp_path / "asked").read_text().split()
    assert asked[:2] == ["--tool", "initcheck"] and asked[-2:] == [str(HERE / "sanitized.py"), "20"]


def test_without_the_tool_it_is_skipped_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main(["memcheck"]) == parts.SKIPPED == sanitize.SKIPPED
    assert "compute-sanitizer is not installed here" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="tool: got \\['memchek'\\], expected one of memcheck, racecheck"):
        sanitize.main(["memchek"])


def test_what_runs_under_it_can_run() -> None:
    cases = list(sanitized.cases())
    assert len(set(cases)) == len(cases)
    assert {case.form for case in cases} == {"base", "block", "bare", "full"}
    for case in cases:
        sanitized.run(case, torch.device("cpu"), "torch")


# -- what the tests of GPUs look for -----------------------------------------------------------------------

SMALL = ((72, 40), (40, 88))


@pytest.mark.parametrize(
    "case",
    [
        Case("base", rank=24),
        Case("base", torch.float32, "sliced", 23),
        Case("block", torch.float16, rank=24),
        Case("full", torch.float32, base=torch.bfloat16),
        Case("base", basis=torch.float32, rank=24),
    ],
    ids=str,
)
def test_a_wrong_result_is_found(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, SMALL, device)
    drifts, squares = filling.step(inputs)
    assert list(findings(case, inputs, drifts, squares)) == []
    grad = inputs.grads[1][32:, 64:].clone()
    # A tile that was never written.
    inputs.grads[1][32:, 64:] = inputs.before[1][32:, 64:]
    assert [finding.split(":")[0] for finding in findings(case, inputs, drifts, squares)] == ["gradient of weight 1"]
    inputs.grads[1][32:, 64:] = grad
    squares[0] *= 1.001
    assert [finding.split(":")[0] for finding in findings(case, inputs, drifts, squares)] == ["square of weight 0"]
    if case.form != "full":
        drifts[1][0, :8] = float("nan")
        assert "C of weight 1" in {finding.split(":")[0] for finding in findings(case, inputs, drifts, squares)}
