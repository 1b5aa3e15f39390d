"""Every variant, compiled for every target without a GPU; what the machine code shows is checked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

import pytest

from rpsft_kernels.ops.triton.aot.library import kernel_id
from rpsft_kernels.ops.triton.aot.targets import BY_ARCHITECTURE, DESCRIPTORS
from rpsft_kernels.ops.triton.compiler import read_file
from rpsft_kernels.ops.triton.variants import SPECIALISED, list_variants
from wheels import FullWheel

# The matrix instructions of each generation.
MATRIX = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTC", "sm_120": "HMMA", "gfx942": "v_mfma"}
# One of each class by which tile shapes are chosen.
RANKS = (32, 64, 128, 768)
PRODUCTS = ("project", "drift", "pull", "gradient", *SPECIALISED)


def read_survey(architecture: str) -> Iterator[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "rpsft_kernels", "compile", "--arch", architecture, "--jobs", "1"]
    command += [word for rank in RANKS for word in ("--rank", str(rank))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    yield from map(json.loads, result.stdout.splitlines())


def of_wheel(wheel: FullWheel) -> Iterator[dict[str, Any]]:
    """The same of the kernels that a wheel carries: they need not be compiled twice."""
    entries = {entry["id"]: entry for entry in wheel.manifest()["kernels"]}
    for variant in list_variants("sm_90", DESCRIPTORS["sm_90"], RANKS):
        entry = entries[kernel_id(variant, "sm_90a")]
        yield asdict(read_file(wheel.kernels / entry["file"], variant.label(), "sm_90", entry["shared"]))


def count(instructions: dict[str, int], *prefixes: str) -> int:
    return sum(n for name, n in instructions.items() if name.startswith(prefixes))


def vector_loads(instructions: dict[str, int]) -> int:
    """128-bit loads from global memory, asynchronous copies and bulk tensor copies."""
    wide = sum(n for name, n in instructions.items() if name.startswith(("LDG", "LDGSTS")) and ".128" in name)
    return wide + count(instructions, "UTMALDG", "global_load_dwordx4", "buffer_load_dwordx4")


@pytest.mark.xdist_group("full wheel")
def test_every_variant_of_the_wheel_compiles_well(full_wheel: FullWheel) -> None:
    check("sm_90", of_wheel(full_wheel))


@pytest.mark.parametrize("architecture", [name for name in MATRIX if name != "sm_90"])
def test_every_variant_compiles_well(architecture: str) -> None:
    check(architecture, read_survey(architecture))


def check(architecture: str, resources: Iterable[dict[str, Any]]) -> None:
    expected = [v.label() for v in list_variants(architecture, DESCRIPTORS[architecture], RANKS)]
    seen = list(resources)
    assert [entry["variant"] for entry in seen] == expected
    for entry in seen:
        name, instructions = entry["variant"], entry["instructions"]
        assert entry["spilled"] == 0, name
        assert 0 < entry["registers"] <= (512 if architecture == "gfx942" else 255), name
        assert entry["shared"] <= BY_ARCHITECTURE[architecture].block_shared, name
        if name.startswith(PRODUCTS):
            assert count(instructions, MATRIX[architecture]) > 0, name
            if architecture in ("sm_90", "sm_100"):
                assert count(instructions, "HMMA") == 0, name
        if "aligned=True" in name:
            assert vector_loads(instructions) > 0, name
            assert count(instructions, "LDG.E.U16", "LDG.E.U8", "global_load_ushort", "buffer_load_ushort") == 0, name
        if "descriptor=True" in name or name.startswith(SPECIALISED):
            assert count(instructions, "UTMALDG") > 0, name
        if name.startswith(SPECIALISED):
            # Registers go from the producer to the consumers, and G goes out as it comes in.
            assert count(instructions, "USETMAXREG") > 0, name
            assert (count(instructions, "UTMASTG") > 0) == name.startswith("hopper_gradient"), name
