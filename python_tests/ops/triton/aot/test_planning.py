"""Planning takes torch and the standard library alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from planned import planned_for
from rpsft_kernels import ops
from rpsft_kernels.ops import Operands, open_run
from rpsft_kernels.ops.triton import toolchain
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH
from rpsft_kernels.ops.triton.program import TritonProgram
from rpsft_kernels.ops.triton.variants import Variant

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
    backend, device, fields, full_form, launch, layout, operation, program, project_drift, pull_back, schedule, scratch,
    table, tile_table, upload, variants
)
from rpsft_kernels.ops.triton.aot import build, dispatch
from rpsft_kernels.tools import schedule as report, tune
assert not any(name.split(".")[0] == "triton" for name in sys.modules)
print(len(list(variants.list_variants("sm_90", True, tile_table.rank_classes()))) > 100)
# On 9.0 the sum that pull reads is rounded by a launch of its own.
for architecture in ("sm_90", "sm_80"):
    print(report.schedule_report([(4096, 4096)], 768, architecture=architecture).launches)
print(tile_table.is_interpreted())
"""
    assert run_without_triton(program).split() == ["True", "6", "5", "False"]
    assert run_without_triton(program, TRITON_INTERPRET="1").split() == ["True", "6", "5", "True"]


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("architecture", "dtype", "readers"),
    [
        ("sm_80", torch.float32, {"pull"}),
        ("sm_80", torch.bfloat16, {"pull"}),
        ("sm_90", torch.float32, {"pull"}),
        ("sm_90", torch.bfloat16, {"round", "hopper_pull"}),
    ],
)
def test_numbers_that_start_off_a_boundary_reach_kernels_on_one(
    architecture: str, dtype: torch.dtype, readers: set[str], on_device: bool
) -> None:
    """Views such as a slice of all scales: the kernels read vectors of 16 bytes."""
    seen: list[int] = []
    reading: set[str] = set()

    def note(variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        seen.extend(argument.data_ptr() for argument in arguments)
        if variant.kernel in ("pull", "round", "hopper_pull"):
            reading.add(variant.kernel)
            columns = ("DRIFT",) if variant.kernel == "pull" else ("DRIFT", "ROUNDED")
            rows = arguments[0].view(-1, WIDTH)
            seen.extend(address for column in columns for address in rows[:, INDEX[column]].tolist())

    weight, basis = torch.zeros(64, 64), torch.zeros(64, 16, dtype=dtype)
    drift, scales = torch.zeros(257)[1:].view(16, 16), torch.ones(9)[1:2]
    assert drift.data_ptr() % 16 and scales.data_ptr() % 16
    factors = scales if on_device else scales.tolist()
    profile = Profile(architecture, 8, DESCRIPTORS[architecture])
    for operands in (Operands(lefts=[basis], rights=[basis]), Operands([weight], pretrained=[weight])):
        with planned_for(profile, note), open_run(TritonProgram(weight.device, [1])) as run:
            staged = run.stage_pull_back(0, [0], operands, [weight], factors, True, [drift])
            run.send()
            run.pull_back_(staged, factors)
    assert reading == readers
    assert len(seen) > 10 and all(seen) and all(address % 16 == 0 for address in seen)


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
