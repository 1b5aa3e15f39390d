"""The emulator sees faults in the kernels: waits, barriers and stores taken out of their PTX, plans
that do not pad, alignment that is only claimed, and what older compilers make of them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from compiling import Compiled, Compiler
from emulated import Backward, Forward
from emulation import COMPILER, NEWEST, WHY_NEWEST, Emulator
from ptxrun import MemoryFault, Program, PtxError, RaceError, RegisterHazard, UninitialisedRead, parse
from rpsft_kernels.ops.triton import backend as kernels
from rpsft_kernels.ops.triton import project_drift, pull_back
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import Access, Precision, Variant, drift_variant, project_variant
from support import operands_of

newest = pytest.mark.skipif(not NEWEST, reason=WHY_NEWEST)
ARCHITECTURES = ("sm_80", "sm_90")
pytestmark = pytest.mark.usefixtures("split_sums")
WAIT = r"wgmma\.wait_group[^;]*;"
STORE = r"(@!?%p\d+\s+)?st\.global[^;]*;"


class Changed(Compiler):
    """Takes the n-th match of a pattern out of the PTX of one kernel."""

    def __init__(self, compiler: Compiler, kernel: str, pattern: str, n: int = 0, instead: str = "") -> None:
        self._original, self._kernel, self._pattern, self._n, self._instead = compiler, kernel, pattern, n, instead

    def compile(self, variant: Variant, architecture: str) -> Compiled:
        compiled = self._original.compile(variant, architecture)
        if variant.kernel != self._kernel:
            return compiled
        match = list(re.finditer(self._pattern, compiled.ptx))[self._n]
        return compiled._replace(ptx=compiled.ptx[: match.start()] + self._instead + compiled.ptx[match.end() :])


def hazards(compiled: Compiled) -> list[str]:
    (entry,) = parse(compiled.ptx).entries.values()
    return [instruction.text() for instruction in Program(entry).wgmma_hazards]


@newest
def test_a_wait_that_is_missing_is_seen_on_some_path(compiler: Compiler) -> None:
    """Every one of the kernel that most weights in bfloat16 are projected by."""
    precision = Precision("bf16", "bf16", "bf16")
    variant = project_variant("sm_90", precision, rank_classes()[-1], False, Access(True, True, False))
    compiled = compiler.compile(variant, "sm_90")
    assert hazards(compiled) == []
    waits = len(re.findall(WAIT, compiled.ptx))
    assert waits >= 2
    for n in range(waits):
        assert hazards(Changed(compiler, variant.kernel, WAIT, n).compile(variant, "sm_90")) != []


@newest
@pytest.mark.parametrize(
    ("architecture", "change", "error"),
    [
        ("sm_90", ("hopper_project", WAIT), RegisterHazard),
        ("sm_90", ("hopper_project", r"mbarrier\.try_wait[^;]*;\s*@!complete[^;]*;"), UninitialisedRead),
        ("sm_90", ("drift", r"bar\.sync[^;]*;", 3), RaceError),
        ("sm_80", ("project", r"cp\.async\.wait_group[^;]*;"), UninitialisedRead),
        ("sm_80", ("drift", r"bar\.sync[^;]*;"), RaceError),
        # A piece of T that is not written is read by the next phase.
        ("sm_90", ("hopper_project", STORE), UninitialisedRead),
        ("sm_80", ("project", STORE, -1), UninitialisedRead),
        ("sm_80", ("drift", STORE, -1), UninitialisedRead),
    ],
)
def test_what_is_missing_in_a_kernel_is_seen(
    architecture: str, change: tuple[Any, ...], error: type[PtxError], compiler: Compiler
) -> None:
    case = Forward(torch.bfloat16, torch.bfloat16, False, torch.bfloat16, 32, "aligned", False)
    case.run(Emulator(architecture, compiler))
    with pytest.raises(error):
        case.run(Emulator(architecture, Changed(compiler, *change)))


@newest
@pytest.mark.parametrize("module", [project_drift, pull_back])
def test_planes_that_are_not_padded_are_seen(module: Any, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were T and P as large as their phases' operands, the tiles of the next one would read what nobody wrote."""
    case = (
        Forward(torch.bfloat16, torch.bfloat16, False, torch.bfloat16, 32, "aligned", False)
        if module is project_drift
        else Backward(torch.bfloat16, torch.bfloat16, True, 32, "aligned", False)
    )
    plans = module.plan_forward if module is project_drift else module.plan_backward
    plans.cache_clear()
    monkeypatch.setattr(module, "round_up", lambda value, unit: -(-value // min(unit, 8)) * min(unit, 8))
    with pytest.raises((UninitialisedRead, MemoryFault)):
        case.run(Emulator("sm_80", compiler))
    plans.cache_clear()


@newest
def test_alignment_that_is_only_claimed_is_seen(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = project_drift.layout_of
    monkeypatch.setattr(
        project_drift,
        "layout_of",
        lambda matrix, transposed: claimed(matrix, transposed)._replace(pointer=True, descriptor=True),
    )
    case = Forward(torch.bfloat16, torch.bfloat16, False, torch.bfloat16, 32, "aligned", False)
    problems = case.problems()
    frame = torch.empty(problems[0].weight.numel() + 1, dtype=torch.bfloat16)
    problems[0] = replace(problems[0], weight=frame[1:].view(problems[0].weight.shape).copy_(problems[0].weight))
    pieces = operands_of(problems)
    for architecture in ARCHITECTURES:
        emulator = Emulator(architecture, compiler)
        emulator.give(*(piece for kind in pieces for piece in kind))
        with emulator, pytest.raises(PtxError, match="misaligned|multiples of 16"):
            kernels.project_drift(pieces)


@pytest.mark.skipif(COMPILER >= (3, 8), reason="Triton 3.8 and newer keep the rule")
def test_older_compilers_break_the_rule(compiler: Compiler) -> None:
    access = Access(True, True, False)
    for rank in rank_classes():
        in_parts = Precision("bf16", "bf16", "fp32")
        plain = drift_variant("sm_90", in_parts, rank, False, access, drift_aligned=True, has_block=False)
        assert hazards(compiler.compile(plain, "sm_90")) != []
        # This one waits for every product.
        specialised = project_variant("sm_90", Precision("bf16", "bf16", "bf16"), rank, False, access)
        assert hazards(compiler.compile(specialised, "sm_90")) == []


@newest
def test_what_python_writes_in_place_holds_something(compiler: Compiler) -> None:
    emulator = Emulator("sm_90", compiler)
    with emulator:
        one, other = torch.empty(4, 8), torch.empty(4, 8)
        other[:, 2:4].zero_()
    assert [emulator.unwritten_bytes(tensor) for tensor in (one, other)] == [128, 96]
