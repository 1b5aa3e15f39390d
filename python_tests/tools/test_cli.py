from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import rpsft_kernels
from rpsft_kernels.tools.cli import main


def test_schedule_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--model", "qwen2.5-7b", "--rank", "768"]) == 0
    printed = capsys.readouterr().out
    assert "142 projected weights, 56 full" in printed
    assert "launches per step" in printed


def test_unknown_targets_are_refused() -> None:
    # In a process of its own: the command turns Triton's interpreter off, which other tests need.
    command = [sys.executable, "-m", "rpsft_kernels", "compile", "--arch", "sm_70"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 1
    assert "--arch: got 'sm_70', expected one of sm_80" in run.stderr


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("schedule --rank 0", "--rank: got 0, expected at least 1"),
        ("schedule --rank 9999", "--rank: got 9999, at which every anchor is full"),
        ("schedule --multiprocessors 0", "--multiprocessors: got 0, expected at least 1"),
        ("schedule --arch sm_91", "--arch: got 'sm_91', expected one of sm_80"),
        ("shards --ranks 8 0", "--ranks: got 0, expected at least 1"),
        ("roofline --rank -1", "--rank: got -1, expected at least 1"),
    ],
)
def test_what_no_table_is_of_is_refused(command: str, message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(command.split())


@pytest.mark.parametrize("command", ["schedule", "shards", "roofline", "kernels", "env", "--help"])
def test_a_closed_pipe_ends_a_command_quietly(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main([command]) == 1


def test_a_closed_pipe_leaves_no_word_at_exit() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "rpsft_kernels", "shards"]
    run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (run.returncode, run.stderr) == (1, "")


def test_env_says_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_ISA", "portable")
    assert main(["env"]) == 0
    printed = capsys.readouterr().out
    lines = {line[:24].strip(): line[24:] for line in printed.splitlines() if line[0] != " "}
    assert lines["rpsft_kernels"] == rpsft_kernels.__version__
    assert lines["torch"].startswith(torch.__version__)
    assert lines["RPSFT_ISA"] == "portable"
    assert lines["cpu torch"] == "available"
    assert "portable" in lines["instruction sets"] or "not built" in lines["instruction sets"]
    assert "kernels" in lines and "triton" in lines
