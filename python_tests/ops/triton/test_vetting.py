"""Code that Triton compiles for compute capability 9.0 is looked at before its first launch; what breaks the rule of
its registers is refused, and served by a kernel compiled ahead of time where there is one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.cache import FileCacheManager

import jitted
from rpsft_kernels.ops.triton import jit, toolchain, vetting
from rpsft_kernels.ops.triton.machine_code.cubin import disassembler
from rpsft_kernels.ops.triton.variants import ARGUMENTS, SPECIALISED, Variant, list_variants
from sass_text import BROKEN, TRITONS, cubin
from world import DEVICE, World, launch

pytestmark = pytest.mark.xdist_group("aot")
REPOSITORY = Path(__file__).resolve().parents[3]
BIND_JIT = jit.bind_jit
IN_REGISTERS = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, {%r3,%r4,%r5,%r6}, %rd1, 1, 1, 1, 0;"
IN_SHARED_MEMORY = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1,%r2}, %rd1, %rd2, %p1, 1, 1, 0, 1;"
_LISTED = list(list_variants("sm_90", True, (768,)))
VARIANTS = {v.kernel: v for v in reversed(_LISTED)}
# Its parts of T in registers are what 3.6 and 3.7 compile wrongly.
DRIFTING = "drift(basis_type=fp32, aligned=True"
VARIANTS["drift"] = next(variant for variant in _LISTED if variant.label().startswith(DRIFTING))


class Kernel:
    """Stands for a kernel of Triton's: gives out kept machine code, and counts."""

    def __init__(self, version: str, name: str) -> None:
        ptx = IN_SHARED_MEMORY if name == "pull" else IN_REGISTERS
        self.compiled = SimpleNamespace(
            hash=f"{version}{name}".encode().hex(), asm={"ptx": ptx, "cubin": cubin(version, name)}
        )
        self.asked: list[dict[str, Any]] = []
        self.launches = 0

    def run(self, *_: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        assert warmup
        self.asked.append(options)
        return self.compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def start(*_: Any, **options: Any) -> None:
            assert options == self.asked[-1], "another kernel was looked at than is launched"
            self.launches += 1

        return start


class Hopper(World):
    """A GPU of compute capability 9.0 whose kernels a version of Triton compiles."""

    def triton(self, version: str) -> None:
        self.monkeypatch.setattr(toolchain, "triton_version", lambda: version)
        self.monkeypatch.setattr(vetting, "_assembler", lambda: "12.8")
        self.kernels = {name: Kernel(version, name) for name in ("project", "gradient", "drift", "pull")}
        self.monkeypatch.setattr(jit, "KERNELS", self.kernels)
        self.new_process()

    def new_process(self) -> None:
        self.monkeypatch.setattr(jit, "_refusals", {})

    def start(self, name: str, arguments: tuple[torch.Tensor, ...] | None = None) -> str:
        """The error's message; "" where the kernel was launched."""
        variant = VARIANTS[name]
        try:
            launch(variant, 3, DEVICE, *(arguments or tuple(torch.zeros(8) for _ in ARGUMENTS[name])))
        except ValueError as error:
            return str(error)
        return ""


@pytest.fixture
def hopper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hopper:
    hopper = Hopper(tmp_path, monkeypatch)
    monkeypatch.setattr(jit, "bind_jit", BIND_JIT)
    monkeypatch.setattr(jit.triton, "set_allocator", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    jit.is_vetted.cache_clear()
    yield hopper
    jit.is_vetted.cache_clear()


def no_scan(image: bytes) -> list[str]:
    raise AssertionError("scanned again")


def read_only(*_: Any, **__: Any) -> str:
    raise PermissionError(13, "Permission denied")


def no_disassembler(image: bytes) -> list[str]:
    raise ValueError("nvdisasm is not found")


@pytest.mark.parametrize("version", TRITONS)
def test_what_breaks_the_rule_is_never_launched(version: str, hopper: Hopper) -> None:
    hopper.triton(version)
    for name, kernel in hopper.kernels.items():
        broken = name in BROKEN[version]
        said = [hopper.start(name) for _ in range(3)]
        assert (kernel.launches, len(kernel.asked)) == (0 if broken else 3, 1)
        assert said == [said[0]] * 3
        assert bool(said[0]) == broken


def test_the_error_says_what_and_why_and_the_ways_out(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper.triton("3.6.0")
    said = hopper.start("project")
    label = VARIANTS["project"].label()
    for part in (
        re.escape(f"{label} is not launched on cuda:0 (NVIDIA H200, compute capability 9.0)"),
        r": as Triton 3\.6\.0 with ptxas 12\.8 compiles it, it may compute wrong numbers: project_kernel: LDSM\.",
        r"writes R.* while HGMMA.* may still use them.* \(and \d+ more of the kind\)\. Take one of: kernels compiled",
        r"pip install \.",
        r"Triton 3\.9 or newer, or a torch that brings it; use_backend\(\"torch\"\)$",
    ):
        assert re.search(part, said), part
    assert "RPSFT_AOT" not in said
    hopper.new_process()
    monkeypatch.setenv("RPSFT_AOT", "0")
    assert "RPSFT_AOT=1, where they are installed (it is 0)" in hopper.start("project")


def test_a_kernel_compiled_ahead_of_time_serves_what_is_ruled_out(
    hopper: Hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper.triton("3.6.0")
    hopper.install((VARIANTS["project"], "sm_90a"))
    assert hopper.start("project") == ""
    assert len(hopper.native.launches) == 1
    assert hopper.kernels["project"].asked == []
    monkeypatch.setenv("RPSFT_AOT", "0")
    assert "is not launched" in hopper.start("project")
    assert len(hopper.native.launches) == 1


@pytest.mark.parametrize(("version", "broken"), [("3.8.0", True), ("3.9.0", False)])
def test_what_was_found_is_kept_beside_the_kernel(
    version: str, broken: bool, hopper: Hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper.triton(version)
    first = hopper.start("project")
    assert bool(first) == broken
    hopper.new_process()
    monkeypatch.setattr(vetting, "scan_cubin", no_scan)
    assert hopper.start("project") == first
    # Other rules or other code are looked at again, and so is what cannot be read.
    (path,) = (hopper.folder / "cache").glob("*/rpsft-registers-*.json")
    for spoilt in ("{", "7", "[7]"):
        path.write_text(spoilt)
        hopper.new_process()
        with pytest.raises(AssertionError, match="scanned again"):
            hopper.start("project")
    path.write_text(json.dumps([]))
    hopper.new_process()
    assert hopper.start("project") == ""
    monkeypatch.setattr(vetting, "RULES", vetting.RULES + 1)
    hopper.new_process()
    with pytest.raises(AssertionError, match="scanned again"):
        hopper.start("project")
    monkeypatch.setattr(vetting, "RULES", vetting.RULES - 1)
    hopper.kernels["project"].compiled.asm["cubin"] += b"\0"
    hopper.new_process()
    with pytest.raises(AssertionError, match="scanned again"):
        hopper.start("project")


@pytest.mark.parametrize(("version", "broken"), [("3.8.0", True), ("3.9.0", False)])
def test_a_cache_that_cannot_be_written_only_costs_time(
    version: str, broken: bool, hopper: Hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton itself is content with one that holds its kernels."""
    monkeypatch.setattr(FileCacheManager, "put", read_only)
    hopper.triton(version)
    for _ in range(2):
        assert bool(hopper.start("project")) == broken
        hopper.new_process()


def test_a_disassembler_that_says_nothing_is_none(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = hopper.folder / "nvdisasm"
    silent.write_text("#!/bin/sh\n")
    silent.chmod(0o755)
    monkeypatch.setenv("TRITON_NVDISASM_PATH", str(silent))
    hopper.triton("3.6.0")
    assert "its machine code cannot be looked at" in hopper.start("project")


@pytest.mark.parametrize(
    ("version", "variables", "reason"),
    [
        ("3.6.0", {}, r"Triton 3\.6\.0 is known to compile such kernels wrongly"),
        ("3.8.1", {}, r"Triton 3\.8\.1 is known to compile such kernels wrongly"),
        ("", {}, r"the version of Triton is not known"),
        ("3.9.0", {"TRITON_PTXAS_PATH": "/opt/ptxas"}, r"TRITON_PTXAS_PATH may change how Triton assembles it"),
        ("3.10.0", {"PTXAS_OPTIONS": "-O1"}, r"PTXAS_OPTIONS may change how Triton assembles it"),
        ("3.9.0", {}, None),
        ("3.10.0", {}, None),
    ],
)
def test_without_a_disassembler_the_version_decides(
    version: str, variables: dict[str, str], reason: str | None, hopper: Hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper.triton("3.8.0")
    monkeypatch.setattr(toolchain, "triton_version", lambda: version)
    for name in toolchain._ASSEMBLER:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(vetting, "scan_cubin", no_disassembler)
    said = hopper.start("project")
    if reason is None:
        assert said == ""
    else:
        assert re.search(rf"{reason}, and its machine code cannot be looked at \(nvdisasm is not found\)", said)
    # Its operands are in shared memory.
    assert hopper.start("pull") == ""
    assert not list(hopper.folder.glob("cache/*/rpsft-*"))


def test_what_has_no_such_product_is_not_disassembled(hopper: Hopper, monkeypatch: pytest.MonkeyPatch) -> None:
    hopper.triton("3.6.0")
    monkeypatch.setattr(vetting, "scan_cubin", no_scan)
    hopper.kernels["project"].compiled.asm["ptx"] = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    assert hopper.start("project") == ""


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (10, 0), (12, 0)])
def test_other_devices_are_left_alone(
    capability: tuple[int, int], hopper: Hopper, monkeypatch: pytest.MonkeyPatch
) -> None:
    hopper.triton("3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    started: list[Variant] = []
    monkeypatch.setattr(jit, "_start", lambda variant, *_: started.append(variant))
    assert hopper.start("project") == ""
    assert started == [VARIANTS["project"]]
    assert hopper.kernels["project"].asked == []


def test_arguments_that_lie_otherwise_make_another_kernel(hopper: Hopper) -> None:
    hopper.triton("3.9.0")
    aligned = tuple(torch.zeros(8) for _ in ARGUMENTS["project"])
    shifted = (*aligned[:-1], torch.zeros(9)[1:])
    for arguments in (aligned, shifted, aligned, shifted):
        assert hopper.start("project", arguments) == ""
    kernel = hopper.kernels["project"]
    assert (len(kernel.asked), kernel.launches) == (2, 4)


def test_the_installed_triton_through_its_own_jit(tmp_path: Path) -> None:
    """Really compiled and looked at: only loading and launching are imitated."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "RPSFT_AOT": "0"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    labels = [VARIANTS[name].label() for name in ("drift", "pull", "squares", *SPECIALISED)]

    def run(**variables: str) -> list[dict[str, Any]]:
        command = [sys.executable, str(Path(jitted.__file__)), *labels]
        done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
        return sorted(results, key=lambda each: str(each["label"]))

    results = run()
    assert [each["label"] for each in results] == sorted(labels)
    for each in results:
        broken = toolchain.triton_version() < "3.8" and each["label"].startswith("drift(")
        assert each["launches"] == (0 if broken else 2)
        assert len(each["said"]) == (2 if broken else 0)
        assert all(f"as Triton {toolchain.triton_version()} with ptxas" in said for said in each["said"])
    # The next process needs no disassembler.
    (tmp_path / "none").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "none").chmod(0o755)
    assert os.access(disassembler(), os.X_OK)
    assert run(TRITON_NVDISASM_PATH=str(tmp_path / "none")) == results
