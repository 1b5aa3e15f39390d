"""``amx_bf16`` through its backend, where the processor has AMX or its instructions can be emulated."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import emulated_amx
from rpsft_kernels.ops import native

pytestmark = pytest.mark.xdist_group("emulated_amx")

# What a user's first calls do, without RPSFT_ISA, on threads of torch's OpenMP.
_FIRST_CALLS = """
import warnings
import torch
import rpsft_kernels as rk
from rpsft_kernels.ops import native

warnings.simplefilter("error")
torch.set_num_threads(3)
torch.manual_seed(0)
start = torch.randn(160, 96).bfloat16()
anchor = rk.Anchor.from_weight(start, 40)
weight = torch.nn.Parameter(start + 0.05 * torch.randn(160, 96).bfloat16())
value = rk.accumulate_rotation_grad_([weight], [anchor], 1.0)
drift = anchor.left.double().mT @ (weight.detach().double() - start.double()) @ anchor.right.double()
exact = 2 * anchor.left.double() @ drift @ anchor.right.double().mT
error = float((weight.grad.double() - exact).norm() / exact.norm())
assert abs(float(value) / float(drift.square().sum()) - 1) < 0.01 and error < 0.01, (value, error)
print(native._load()[0].team_kind(), native.instruction_set())
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The engine linked with the emulator."""
    if native.missing():
        pytest.skip(f"no engine: {native.missing()}")
    reason = native.missing_instruction_sets().get("amx_bf16", "")
    if reason and reason != "this processor has no AMX-BF16":
        pytest.skip(f"amx_bf16: {reason}")
    return emulated_amx.link(tmp_path_factory.mktemp("emulated_amx"))


def test_the_first_call_compares_and_then_uses_it(module: Path) -> None:
    assert emulated_amx.run(module, _FIRST_CALLS).split() == ["OpenMP", "amx_bf16"]


def test_the_tests_of_the_engine_pass_with_it(module: Path) -> None:
    arguments = ["-p", "no:cacheprovider", "-p", "no:faulthandler", "-p", "no:xdist", "-k", "amx_bf16"]
    arguments.append("python_tests/ops/test_native.py")
    output = emulated_amx.run(module, f"import sys, pytest\nsys.exit(pytest.main({arguments!r}))")
    passed = re.search(r"(\d+) passed, \d+ deselected", output)
    assert passed and int(passed[1]) > 50, output[-2000:]
    assert "skipped" not in output, output[-2000:]
