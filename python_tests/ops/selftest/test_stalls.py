"""A kernel that never ends ends the self-test all the same, which names it and waits for nothing more."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels.ops.selftest import checks, command, gate, record, subjects, suite
from rpsft_kernels.ops.selftest.cases import quick_cases
from rpsft_kernels.ops.selftest.checks import Subject
from rpsft_kernels.ops.selftest.suite import Launches, SelfTestResult
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.variants import Variant
from rpsft_kernels.ops.triton.waiting import Stalled

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
PROJECT, DRIFT = (Variant(name, (("BLOCK_M", 64),), warps=4, stages=1) for name in ("project", "drift"))


class Stalling(Subject):
    """Plain PyTorch on the CPU, as if on a GPU whose work no longer ends after so many calls."""

    calls: list[int]

    def settle(self) -> None:
        self.calls.append(1)
        if len(self.calls) > 7:
            raise Stalled("it does not end")


def test_no_case_follows_one_that_does_not_end() -> None:
    subject = Stalling("torch", CPU, bitwise=False)
    object.__setattr__(subject, "calls", [])
    cases = list(quick_cases((32,)))
    done: list[int] = []
    result = suite.run(subject, cases, complete=False, repeats=4, progress=done.append)
    assert done == [1], "the first case waits for its four checks, for every second of its repeats, and for their end"
    assert result.stalled and not result.passed
    assert result.failures == [f"{cases[1]}: it does not end"]
    assert result.notes == ["the cases after this one were not run"]
    assert len(subject.calls) == 8, "nothing was waited for again"


def test_results_are_read_when_all_calls_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them sooner would wait for ever, in code that cannot be interrupted."""
    subject = Stalling("torch", CPU, bitwise=False)
    object.__setattr__(subject, "calls", [])
    waits_at: list[int] = []

    def note_waits(*arguments: Any) -> Any:
        waits_at.append(len(subject.calls))
        return iter(())

    monkeypatch.setattr(checks, "_compare_drifts", note_waits)
    monkeypatch.setattr(checks, "_report_differing", note_waits)
    case = next(each for each in quick_cases((32,)) if each.operation == "drift" and not each.tall)
    checks.check_repeats(case, subject, (40, 72, 8), 3, 4)
    assert waits_at == [1, 3], "after the first call, and after two more and all"


def test_the_first_launch_of_a_kernel_is_waited_for_by_itself() -> None:
    """The driver may wait for it where the next kernel's code is loaded, and it could not be named any more."""
    waits: list[str] = []
    arguments: Sequence[Tensor] = [torch.zeros(4)] * 5

    def settle() -> None:
        waits.append("waited")
        if len(waits) == 2:
            raise Stalled("cuda:0 has not come to the end")

    launches = Launches(Profile("sm_90", 132, True), settle)
    for _ in range(3):
        launches.on_launch(PROJECT, 4, arguments[:4])
    assert len(waits) == 1
    with pytest.raises(Stalled, match=r"drift\(block_m=64, warps=4, stages=1\) does not end: cuda:0 has not come"):
        launches.on_launch(DRIFT, 4, arguments)


def stalled_result(device: torch.device) -> SelfTestResult:
    return SelfTestResult(Subject("triton", device), failures=["a case: project(...) does not end"], stalled=True)


def test_the_error_says_what_hangs_and_is_seen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Any
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("RPSFT_SELFTEST", raising=False)
    monkeypatch.setattr(gate, "_passed", set())
    monkeypatch.setattr(gate, "_failed", {})
    monkeypatch.setattr(record, "collect_facts", lambda device: {"device": "imaginary"})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("Facts", (), {"name": "Imaginary H100"}))
    monkeypatch.setattr(torch.cuda, "device", lambda _: subjects._set_environment({}))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    runs: list[torch.device] = []

    def run_quick_part(device: torch.device) -> SelfTestResult:
        runs.append(device)
        return stalled_result(device)

    def wait() -> None:
        raise AssertionError("this would wait for the kernel that does not end")

    monkeypatch.setattr(subjects, "run_quick_part", run_quick_part)
    monkeypatch.setattr(torch.cuda, "empty_cache", wait)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"hangs on cuda:0 \(Imaginary H100\)") as raised:
            gate.ensure(GPU)
        for words in ("a case: project(...) does not end", "RPSFT_BACKEND=torch", "kill -9", "selftest"):
            assert words in str(raised.value)
    assert runs == [GPU]
    # Programs that catch the error, or wait for the GPU on their way out, show it all the same.
    assert [entry.levelname for entry in caplog.records] == ["ERROR"]
    assert str(raised.value) == caplog.records[0].getMessage()
    assert not list(tmp_path.rglob("selftest-*.json"))


def test_what_the_program_has_queued_is_not_the_tests_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            steps.append("the program's work has ended")

    class Job:
        def run(self) -> SelfTestResult:
            steps.append("the test runs")
            return SelfTestResult(Subject("triton", GPU))

    monkeypatch.setattr(torch.cuda, "current_stream", {GPU: Stream()}.__getitem__)
    monkeypatch.setattr(subjects, "_triton_job", lambda device, quick: Job())
    subjects.run_quick_part(GPU)
    assert steps == ["the program's work has ended", "the test runs"]


def test_the_command_does_not_wait_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Job:
        title, cases = "kernels of an imaginary GPU", ()

        def run(self, progress: Any) -> SelfTestResult:
            return stalled_result(CPU)

    def leave(status: int) -> None:
        raise SystemExit(f"left at once with status {status}")

    monkeypatch.setattr(command, "list_jobs", lambda *_: ([Job(), Job()], []))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit, match="left at once with status 1"):
        command.test_device(CPU, quick=True)
    printed = capsys.readouterr().out
    assert printed.count("FAILED: a case: project(...) does not end") == 1
    assert printed.endswith("a kernel hangs: nothing else was tested\n")
