"""The quick self-test runs by itself before the first launch, once for a machine and its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

PROGRAM = """
import logging, sys, torch
import rpsft_kernels as rk
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
pretrained = torch.randn(96, 64, device="cuda")
anchor = rk.Anchor.from_weight(pretrained, 8)
weight = (1.01 * pretrained).requires_grad_()
with rk.use_backend("triton"):
    print("R is positive:", rk.accumulate_rotation_grad_(weight, anchor, 1.0).item() > 0)
"""


def run_step(cache: Path, **variables: str) -> str:
    """Run a process that makes one step, with records of self-tests in ``cache``; returns what it prints."""
    environment = {name: value for name, value in os.environ.items() if name != "RPSFT_SELFTEST"}
    environment |= {"XDG_CACHE_HOME": str(cache), **variables}
    command = [sys.executable, "-c", PROGRAM]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.splitlines()[-1] == "R is positive: True"
    return run.stdout


def test_it_runs_once(tmp_path: Path, device: torch.device) -> None:
    first = run_step(tmp_path)
    assert "no record of having passed the self-test: the quick part runs now" in first
    assert "self-test passed in" in first
    (record,) = (tmp_path / "rpsft_kernels").glob("selftest-*.json")
    assert "self-test" not in run_step(tmp_path)
    record.write_text("{}")
    assert "self-test passed in" in run_step(tmp_path)


def test_it_can_be_left_out(tmp_path: Path, device: torch.device) -> None:
    assert "self-test" not in run_step(tmp_path, RPSFT_SELFTEST="0")
    assert not list(tmp_path.rglob("selftest-*.json"))
