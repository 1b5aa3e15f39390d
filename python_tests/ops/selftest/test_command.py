"""``python -m rpsft_kernels selftest``: its table, its exit status, and devices that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rpsft_kernels.ops import reference
from rpsft_kernels.ops.selftest import command, subjects
from rpsft_kernels.ops.selftest.cases import quick_cases
from rpsft_kernels.tools.cli import main


@pytest.fixture(autouse=True)
def _few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    def list_one_job(device: torch.device, quick: bool) -> Any:
        jobs, untested = subjects.list_jobs(device, quick)
        del jobs[1:]
        jobs[0].cases[:] = list(quick_cases((32,)))[:3]
        return jobs, [*untested, "a backend on the CPU: not tested: it is not there"]

    monkeypatch.setattr(command, "list_jobs", list_one_job)


@pytest.mark.parametrize("options", [[], ["--quick"]])
def test_a_pass(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "cpu", *options]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "torch on the CPU"
    head, *lines = printed[2:5]
    assert " ".join(head.split()) == "operation form W W0 U, V G cases worst error bound repeats verdict"
    assert [line.split()[:7] for line in lines] == [
        ["drift", "base", "bf16", "bf16", "bf16", "-", "1"],
        ["gradient", "any", "-", "-", "bf16", "bf16", "2"],
    ]
    assert all(line.endswith("ok") for line in lines)
    assert printed[6].startswith("passed, ")
    assert printed[-1] == "a backend on the CPU: not tested: it is not there"


def test_a_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    project = reference.project_drift

    def project_doubled(*arguments: Any) -> Any:
        drifts, squares = project(*arguments)
        return [2 * drift for drift in drifts], 4 * squares

    monkeypatch.setattr(reference, "project_drift", project_doubled)
    assert main(["selftest", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert " FAILED\n" in printed and "FAILED: drift of base anchors (W bf16, W0 bf16, bases bf16" in printed
    assert " FAILURES, " in printed


@pytest.mark.parametrize(
    ("count", "asked", "expected"),
    [
        (0, "cuda", f"cpu: torch {torch.__version__} sees no GPU"),
        (0, "cuda:3", f"cpu: torch {torch.__version__} sees no GPU"),
        (1, "cuda:1", f"cuda:0 or cpu: torch {torch.__version__} sees one GPU"),
        (2, "cuda:2", "cuda:0 to cuda:1, or cpu"),
    ],
)
def test_a_gpu_that_is_not_there(
    count: int, asked: str, expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert main(["selftest", "--device", asked]) == 1
    printed = capsys.readouterr().out
    assert printed == f"--device: got {asked}, expected {expected}; python -m rpsft_kernels env says what is here\n"


def test_a_device_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="--device: got 'gpu', expected cuda, cuda:1 or cpu"):
        main(["selftest", "--device", "gpu"])
    assert main(["selftest", "--device", "meta"]) == 1
    assert "expected a GPU" in capsys.readouterr().out
