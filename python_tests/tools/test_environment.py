"""``python -m rpsft_kernels env`` on made-up machines: it says how each GPU is served, and never fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rpsft_kernels.ops import native
from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton import toolchain
from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from rpsft_kernels.ops.triton.aot import loader as aot_loader
from rpsft_kernels.ops.triton.aot.library import Device
from rpsft_kernels.tools import environment
from world import SQUARES, World

NO_TRITON = "the package triton is not installed (pip install triton)"
NO_COMPILER = (
    "Triton needs a C compiler at its first launch, and neither gcc nor clang is found (install gcc, or set CC)"
)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


@pytest.fixture
def two(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A machine with an H100 and an RTX 4090."""
    capabilities = ((9, 0, "H100"), (8, 9, "RTX 4090"))

    def properties(device: torch.device | int) -> SimpleNamespace:
        major, minor, name = capabilities[device if isinstance(device, int) else device.index]
        return SimpleNamespace(major=major, minor=minor, name=name, total_memory=80 << 30, multi_processor_count=132)

    def facts(index: int) -> Device:
        major, minor, _ = capabilities[index]
        return Device(10 * major + minor, 99 << 10, 12040)

    triton_device.own_profile.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index][:2])
    monkeypatch.setattr(aot_dispatch, "_device_facts", facts)
    monkeypatch.setattr(world.native, "driver_version", lambda: 12040, raising=False)
    monkeypatch.setattr("rpsft_kernels.ops.triton.backend._is_interpreted", lambda: False)
    return world


@pytest.fixture(autouse=True)
def _no_profile_stays() -> object:
    yield
    triton_device.own_profile.cache_clear()


def report() -> dict[str, str]:
    lines: dict[str, str] = {}
    name = ""
    for line in environment.environment_report().splitlines():
        name = line[:24].strip() or name
        lines[name] = lines.get(name, "") + line[24:]
    return lines


def test_every_device_is_told_how_it_is_served(two: World) -> None:
    two.install(two.entry(SQUARES, "sm_80", ptx=True), (SQUARES, "sm_90a"))
    lines = report()
    assert lines["GPUs"] == "2 that torch sees"
    assert lines["CUDA driver"] == "CUDA 12.4"
    assert lines["JIT on a GPU"] == "Triton can compile and start kernels"
    assert lines["cuda:0"] == "H100, 9.0, 80 GiB"
    assert lines["cuda:0 kernels"] == "sm_90a machine code (exact), table sm_90, 1 kernels"
    assert lines["cuda:1 kernels"] == "sm_80 machine code (compatible), table sm_80, 1 kernels"
    assert lines["cuda:0 triton"] == lines["cuda:1 triton"] == "available"
    two.install(two.entry(SQUARES, "sm_80", ptx=True))
    assert report()["cuda:0 kernels"] == "sm_80 PTX, which the driver translates, table sm_80, 1 kernels"


@pytest.mark.parametrize(
    ("cause", "why"), [("triton_missing", NO_TRITON), ("compiler_missing", NO_COMPILER)], ids=["triton", "compiler"]
)
def test_what_compilation_wants_is_named(cause: str, why: str, two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    two.install((SQUARES, "sm_90a"))
    held = "this installation's kernels (sm_90a) do not run on compute capability 8.9"
    assert report()["cuda:1 kernels"] == f"JIT, table sm_86: {held}"
    monkeypatch.setattr(toolchain, cause, lambda: why)
    lines = report()
    assert lines["JIT on a GPU"] == why
    assert lines["cuda:0 triton"] == "available"
    assert lines["cuda:1 kernels"] == f"none: {held}; {why}"
    assert lines["cuda:1 triton"] == f"{why}, and {held}"


def test_a_table_that_was_tuned_is_compiled(two: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two.install((SQUARES, "sm_90a"))
    (tmp_path / "tuned.json").write_text('{"architecture": "sm_90"}')
    monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "tuned.json"))
    said = "JIT, table sm_90: RPSFT_TILES changes the table sm_90, which kernels were compiled of"
    assert report()["cuda:0 kernels"] == said


def test_it_never_fails(two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the machine or the environment is reported in its place, and all other facts as ever."""
    two.install((SQUARES, "sm_90a"))
    monkeypatch.setenv("RPSFT_AOT", "yes")
    monkeypatch.setenv("RPSFT_TILES", "/nowhere/table.json")
    monkeypatch.setenv("RPSFT_ANYTHING", "set")

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA unknown error")

    monkeypatch.setattr(torch.cuda, "get_device_properties", fails)
    monkeypatch.setattr(two.native, "driver_version", fails)
    monkeypatch.setattr(torch, "get_num_threads", fails)
    lines = report()
    assert lines["RPSFT_ANYTHING"] == "set"
    assert (
        lines["threads"]
        == lines["CUDA driver"]
        == lines["cuda:0"]
        == "cannot be told: RuntimeError: CUDA unknown error"
    )
    assert lines["cuda:1 kernels"].startswith("cannot be told: ")
    assert lines["cpu torch"] == "available"
    monkeypatch.setattr(torch.cuda, "is_available", fails)
    assert report()["GPUs"] == "cannot be told: RuntimeError: CUDA unknown error"


def test_a_bad_mode_is_told(two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    two.install((SQUARES, "sm_90a"))
    monkeypatch.setenv("RPSFT_AOT", "yes")
    message = "cannot be told: ValueError: environment variable RPSFT_AOT: got 'yes', expected 0, 1 or only"
    assert report()["cuda:0 kernels"] == message


def test_instruction_sets_that_cannot_run_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {name for name in report() if name.startswith("no ")} == {
        f"no {n}" for n in native.missing_instruction_sets()
    }
    module = SimpleNamespace(missing_instruction_sets=lambda: [("amx_bf16", "Linux refused")])
    monkeypatch.setattr(native, "_load", lambda: (module, None))
    assert report()["no amx_bf16"] == "Linux refused"


def test_an_installation_without_engine_and_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    why = "this installation carries no compiled CPU engine: no C++ compiler: c++ was not found"
    monkeypatch.setattr(native, "_load", lambda: (None, why))
    monkeypatch.setattr(native, "instruction_sets", lambda: ())
    missing = "this installation carries no native module to launch them"
    monkeypatch.setattr(aot_loader, "_import_launcher", lambda: (None, missing))
    lines = report()
    assert lines["instruction sets"] == lines["cpu native"] == why
    assert lines["CUDA driver"] == "this installation carries no native module to launch them"
    assert lines["distribution"]


def test_what_becomes_of_code_for_hopper_is_told(two: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "triton_version", lambda: "3.6.0")
    assert report()["JIT on 9.x"] == (
        "Triton 3.6.0 compiles kernels wrongly (the plain forms of project and, with float32 bases, drift and "
        "gradient): those are not launched"
    )
    monkeypatch.setattr(toolchain, "triton_version", lambda: "3.9.0")
    assert report()["JIT on 9.x"] == "code is looked at before its first launch"
    monkeypatch.setenv("TRITON_NVDISASM_PATH", "/nowhere/nvdisasm")
    for name in toolchain._ASSEMBLER:
        monkeypatch.delenv(name, raising=False)
    assert report()["JIT on 9.x"].startswith(
        "nothing speaks against this Triton; code cannot be looked at: environment variable TRITON_NVDISASM_PATH: "
    )
    monkeypatch.setenv("TRITON_PTXAS_PATH", "/opt/ptxas")
    assert report()["JIT on 9.x"].startswith("TRITON_PTXAS_PATH may change how Triton assembles it; code cannot")
    monkeypatch.setattr(toolchain, "triton_missing", lambda: NO_TRITON)
    assert report()["JIT on 9.x"] == NO_TRITON
