"""Planning takes torch and the standard library alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from rpsft_kernels import ops
from rpsft_kernels.ops.triton import full_form, pull_back, toolchain
from rpsft_kernels.ops.triton.device import Profile

WITHOUT_TRITON = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run_without_triton(program: str, **environment: str) -> str:
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON + program], env=variables, capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def test_planning_imports_no_triton() -> None:
    program = """
from rpsft_kernels.ops.triton import (
    device, fields, full_form, launch, layout, project_drift, pull_back, schedule, tile_table, upload, variants
)
from rpsft_kernels.ops.triton.aot import build, dispatch
from rpsft_kernels.tools import schedule as report, tune
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
print(len(list(variants.list_variants("sm_90", True, tile_table.rank_classes()))) > 100)
print(report.schedule_report([(4096, 4096)], 768).launches)
print(tile_table.interpreted())
"""
    assert run_without_triton(program).split() == ["True", "5", "False"]
    assert run_without_triton(program, TRITON_INTERPRET="1").split() == ["True", "5", "True"]


def test_numbers_that_start_off_a_boundary_reach_kernels_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Views such as a slice of all scales: the kernels read vectors of 16 bytes."""
    seen: list[int] = []
    for module in (pull_back, full_form):
        monkeypatch.setattr(module, "device_profile", lambda _: Profile("sm_80", 8, False))
        monkeypatch.setattr(module, "launch", lambda variant, n, d, *rest: seen.append(rest[-1].data_ptr()))
    weight, basis = torch.zeros(64, 64), torch.zeros(64, 16)
    scales = torch.ones(9)[1:2]
    assert scales.data_ptr() % 16
    pull_back.run_backward([weight], [basis], [basis], [torch.zeros(257)[1:].view(16, 16)], scales, True)
    pulled = seen[0]
    full_form.run_whole_backward([weight], [weight], [weight], scales, True)
    assert pulled % 16 == seen[-1] % 16 == 0


@pytest.mark.parametrize(("version", "words"), [("3.2.0", "3.2.0 is too old"), ("3.6.0", ""), ("3.10.1+git", "")])
def test_an_old_triton_is_named(version: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    toolchain.triton_missing.cache_clear()
    try:
        missing = toolchain.triton_missing()
        assert missing is None if not words else words in str(missing)
        reason = ops.available_backends(torch.device("cpu"), torch.float32)["triton"]
        assert not words or (reason is not None and words in reason)
    finally:
        toolchain.triton_missing.cache_clear()
