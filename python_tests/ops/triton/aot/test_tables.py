"""Which tile table launches are planned with, and that its kernels then serve every launch."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from planned import profiled
from rpsft_kernels.ops import Operands
from rpsft_kernels.ops.triton import backend, tile_table
from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton import launch as triton_launch
from rpsft_kernels.ops.triton.aot import library as aot_library
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS, Compatibility, Generation, cuda_architecture
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import Variant, list_variants
from rpsft_kernels.tools import tune
from world import DEVICE, SQUARES, World

# Bytes of shared memory that a block of these capabilities may have.
LIMITS = {86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# The most that a kernel of the table sm_80 takes, as Triton 3.9 compiles it.
LARGEST = 98304


@pytest.fixture(autouse=True)
def _tables_are_read_anew() -> Any:
    tile_table.forget_tuned()
    yield
    tile_table.forget_tuned()


def become(world: World, capability: int, **facts: int) -> None:
    """The device, and its own profile."""
    own = cuda_architecture(capability)
    world.device(capability, LIMITS[capability], **facts)
    world.monkeypatch.setattr(triton_device, "own_profile", lambda _: triton_device.Profile(own, 8, DESCRIPTORS[own]))


def wheel(world: World, *architectures: str, shared: int = LARGEST) -> None:
    """Every kernel of a build for these architectures, under its real id."""
    entries = []
    for arch in architectures:
        table = arch.rstrip("a")
        for variant in list_variants(table, DESCRIPTORS[table], rank_classes()):
            entries.append(world.entry(variant, arch, ptx=not arch.endswith("a"), shared=shared))
    world.install(*entries)


def step(world: World) -> list[str]:
    """One weight's forward and backward pass at two ranks; the files that were launched."""
    find = triton_launch.find_start

    def find_start(variant: Variant, programs: int, _: torch.device, arguments: tuple[Tensor, ...]) -> Any:
        return find(variant, programs, DEVICE, arguments)

    before = len(world.native.launches)
    with profiled(triton_device.device_profile(DEVICE)), mock.patch.object(triton_launch, "find_start", find_start):
        for rank in (32, 144):
            weight = torch.zeros(256, 320, dtype=torch.bfloat16)
            left, right = (torch.zeros(size, rank, dtype=torch.bfloat16) for size in weight.shape)
            drifts, _ = backend.project_drift(Operands([weight], [left], [right], [weight.clone()]))
            subspaces = Operands(lefts=[left], rights=[right])
            backend.pull_back_into([torch.zeros(256, 320)], subspaces, drifts, torch.ones(1), True)
    return sorted({image.decode().split("-")[1] for image, *_ in world.native.launches[before:]})


@pytest.mark.parametrize("triton", [None, "the package triton is not installed (pip install triton)"])
@pytest.mark.parametrize(
    ("held", "capability", "table", "file", "said"),
    [
        ("sm_80", 86, "sm_80", "sm_80.cubin", "sm_80 machine code, which compute capability 8.6 runs too"),
        ("sm_80", 89, "sm_80", "sm_80.cubin", "sm_80 machine code, which compute capability 8.9 runs too"),
        ("sm_80", 90, "sm_80", "sm_80.ptx", "sm_80 PTX, which the driver translates for compute capability 9.0"),
        ("sm_80", 120, "sm_80", "sm_80.ptx", "sm_80 PTX, which the driver translates for compute capability 12.0"),
        ("sm_86", 89, "sm_86", "sm_86.cubin", "sm_86 machine code, which compute capability 8.9 runs too"),
        ("sm_80 sm_90a", 90, "sm_90", "sm_90a.cubin", ""),
    ],
)
def test_kernels_that_run_on_a_device_serve_all_its_launches(
    held: str,
    capability: int,
    table: str,
    file: str,
    said: str,
    triton: str | None,
    world: World,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "rpsft_kernels")
    world.monkeypatch.setattr("rpsft_kernels.ops.triton.toolchain.triton_missing", lambda: triton)
    wheel(world, *held.split())
    become(world, capability)
    assert triton_device.device_profile(DEVICE) == triton_device.Profile(table, 8, DESCRIPTORS[table])
    assert step(world) == [file]
    assert world.compiled == []
    if table == "sm_90":
        phases = {"hopper_project", "drift", "round", "hopper_pull", "hopper_gradient"}
    else:
        phases = {"project", "drift", "pull", "gradient"}
    assert {image.decode().split("-")[0] for image, *_ in world.native.launches} == {*phases, "squares"}
    line = f"{said}, with the tiles of {table}" if said else "sm_90a machine code on compute capability 9.0"
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [f"cuda:0: kernels compiled ahead of time, {line}"]


def test_a_table_one_of_whose_kernels_does_not_fit_is_no_choice(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rpsft_kernels")
    wheel(world, "sm_80", shared=LIMITS[86] + 1)
    become(world, 86)
    assert triton_device.device_profile(DEVICE).architecture == "sm_86"
    assert step(world) == []
    listed = set(list_variants("sm_86", False, rank_classes()))
    assert world.compiled and set(world.compiled) <= listed
    assert ["Triton compiles" in record.getMessage() for record in caplog.records] == [True]


def test_the_newest_older_table_is_taken(world: World) -> None:
    wheel(world, "sm_80", "sm_86", "sm_90a")
    become(world, 120)
    assert (triton_device.device_profile(DEVICE).architecture, step(world)) == ("sm_86", ["sm_86.ptx"])
    become(world, 100)
    assert triton_device.device_profile(DEVICE).architecture == "sm_86"


def test_tuning_is_about_the_own_table(world: World, tmp_path: Path) -> None:
    """Although kernels of another one are installed; and what was tuned is then compiled."""
    wheel(world, "sm_80")
    become(world, 86)
    seen = set()

    def run() -> None:
        seen.add(triton_device.device_profile(DEVICE).architecture)

    layer = SimpleNamespace(list_variants=lambda _: [], open_phase=lambda _: nullcontext(run))
    world.monkeypatch.setattr(tune, "Layer", lambda *_: layer)
    table = tune.tune([(256, 320)], 144, DEVICE, [], timer=lambda run: 1.0, compile_all=lambda *_: {})
    assert (table["architecture"], seen) == ("sm_86", {"sm_86"})
    assert triton_device.device_profile(DEVICE).architecture == "sm_80"
    table["project"]["one part"][-1]["stages"] = 2
    tune.write_table(table, tmp_path / "table.json")
    world.monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "table.json"))
    assert triton_device.device_profile(DEVICE).architecture == "sm_86"
    assert step(world) == ["sm_80.cubin"], "what both tables have in common"
    assert any(variant.kernel == "project" and variant.stages == 2 for variant in world.compiled)
    # The kernels no longer belong to the table that they were compiled for.
    (tmp_path / "other.json").write_text(json.dumps(table | {"architecture": "sm_80"}))
    world.monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "other.json"))
    assert triton_device.device_profile(DEVICE).architecture == "sm_86"


@pytest.mark.parametrize("content", ["[]", "{", "7"])
def test_a_file_that_is_no_table_is_named(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.json").write_text(content)
    monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "table.json"))
    with pytest.raises(ValueError, match=r"RPSFT_TILES: cannot read '.*table\.json'"):
        tile_table.tuned_architecture()


def test_asking_again_costs_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step asks for the profile several times: the manifest is gone through once."""
    wheel(world, "sm_80", "sm_90a")
    become(world, 89)
    parsed = []
    same_major = Compatibility.SAME_MAJOR
    monkeypatch.setattr(Generation, "cubin_compatibility", lambda self, _: parsed.append(self) or same_major)
    monkeypatch.setattr(aot_library, "_obstacle", lambda *_: parsed.append(None))
    triton_device.device_profile(DEVICE)
    world.launch(SQUARES)
    assert parsed
    parsed.clear()
    for _ in range(100):
        triton_device.device_profile(DEVICE)
        world.launch(SQUARES)
    assert parsed == []
