"""Every variant for sm_80 and sm_90 as compiled PTX in the emulator: values, bounds, alignment, races, registers of
products in flight, and that nothing is read that was not written.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import pytest
import torch

from compiling import Compiler
from emulated import Forward, asked, chosen, ways
from emulation import NEWEST, WHY_NEWEST, Emulator
from rpsft_kernels.ops.triton import backend as kernels
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.machine_code.cubin import disassemble
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import SPECIALISED, Variant, list_variants
from support import operands_of

newest = pytest.mark.skipif(not NEWEST, reason=WHY_NEWEST)
ARCHITECTURES = ("sm_80", "sm_90")
pytestmark = pytest.mark.usefixtures("split_sums")
PRODUCTS = ("project", "drift", "pull", "gradient", *SPECIALISED)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_cases_are_all_that_is_listed(architecture: str) -> None:
    launched: set[Variant] = set()
    for way, rank in ways(architecture):
        for case in chosen(architecture, way, rank):
            launched |= asked(architecture, case)
    listed = set(list_variants(architecture, DESCRIPTORS[architecture], rank_classes()))
    assert [variant.label() for variant in listed - launched] == []


@newest
@pytest.mark.parametrize(
    ("architecture", "way", "rank"), [(a, way, rank) for a in ARCHITECTURES for way, rank in ways(a)]
)
def test_every_variant_in_the_emulator(architecture: str, way: str, rank: int, compiler: Compiler) -> None:
    """Values too; and of the registers of products in flight it is proven that none is touched, on any path."""
    for case in chosen(architecture, way, rank):
        emulator = Emulator(architecture, compiler)
        try:
            case.run(emulator)
        except Exception as error:
            raise AssertionError(f"{architecture}, {case}: {error}") from error
        for variant, stats in emulator.stats:
            assert stats.hazards == [], variant.label()
            assert stats.count("wgmma.mma" if architecture == "sm_90" else "mma") or variant.kernel not in PRODUCTS


@newest
def test_the_result_does_not_depend_on_the_order_of_programs(compiler: Compiler) -> None:
    case = Forward(torch.bfloat16, torch.bfloat16, False, torch.bfloat16, 32, "aligned", False)
    results = []
    for order in ("forward", "reverse"):
        emulator = Emulator("sm_90", compiler, order)
        pieces = operands_of(case.problems())
        emulator.give(*(piece for kind in pieces for piece in kind))
        with emulator:
            drifts, squares = kernels.project_drift(pieces)
        results.append((*drifts, squares))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@newest
def test_what_a_descriptor_replaces_is_thrown_away(compiler: Compiler) -> None:
    """Machine code writes a descriptor into scratch memory by exchanges, which compute-sanitizer's initcheck takes for
    reads of memory that was never written: what is exchanged for it goes nowhere (RZ). There are no other atomics.
    """
    found = set()
    for variant in list_variants("sm_90", True, rank_classes()[-1:]):
        descriptors = variant.kernel in SPECIALISED or dict(variant.constants).get("DESCRIPTOR")
        if variant.kernel in found or not descriptors:
            continue
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiler.compile(variant, "sm_90").cubin)
            file.flush()
            code = disassemble(Path(file.name))
        atomics = re.findall(r"\b(?:ATOM|RED)\w*(?:\.\w+)* [^;]*;", code)
        assert atomics
        assert all(re.match(r"ATOMG\.E\.EXCH\.STRONG\.GPU PT, RZ, \[R\d+\], R\d+ ?;", text) for text in atomics), (
            atomics
        )
        found.add(variant.kernel)
    assert found == set(PRODUCTS)
