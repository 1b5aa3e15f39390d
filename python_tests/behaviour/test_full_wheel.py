"""A wheel with all kernels of one architecture and the engine that launches them, as a user would build it.

The slowest fixture of all; what else reads these kernels shares its worker.
"""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import pytest

from elf import needed_libraries
from rpsft_kernels.ops.triton.aot import library as aot_library
from rpsft_kernels.ops.triton.aot.build import build_kernels
from rpsft_kernels.ops.triton.aot.check import check_kernels
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import list_variants
from rpsft_kernels.tools.cli import main
from wheels import FullWheel

pytestmark = pytest.mark.xdist_group("full wheel")


def test_every_kernel_is_there_and_is_what_its_entry_says(
    full_wheel: FullWheel, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = list(list_variants("sm_90", True, rank_classes()))
    checked = check_kernels(full_wheel.path)
    assert checked.findings == []
    assert checked.complete
    assert checked.kernels == len(variants) > 300
    assert checked.architectures == ("sm_90a",)
    assert main(["kernels", "--check", str(full_wheel.path)]) == 0
    assert re.search(r"kernels \(every variant\) for sm_90a in \d+ files: nothing amiss", capsys.readouterr().out)


def test_the_build_says_what_it_took(full_wheel: FullWheel, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = r"(\d+) kernels in \d+ files, [\d.]+ MB, (\d+) s; peak memory (\d+) MiB in the largest of (\d+) processes"
    found = re.search(pattern, full_wheel.printed)
    assert found is not None
    assert re.search(rf"compiling kernels for sm_90a in {found[4]} processes", full_wheel.printed)
    # Two of them, and what they leave to the machine, fit 8 GiB.
    assert int(found[3]) < 1536
    # So that a wheel for three architectures, with PTX, fits 40 MB.
    assert full_wheel.path.stat().st_size < 10e6
    with capsys.disabled():
        print(f"\nfull wheel for sm_90: {found[0]}; {full_wheel.path.stat().st_size / 1e6:.1f} MB")


def test_its_name_and_metadata_say_what_it_holds(full_wheel: FullWheel) -> None:
    assert full_wheel.path.name.startswith(f"rpsft_kernels-{full_wheel.version}-cp")
    with zipfile.ZipFile(full_wheel.path) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        text = archive.read(metadata).decode()
    assert f"\nVersion: {full_wheel.version}\n" in text
    assert re.search(r"^Keywords: .*\bkernels-sm_90a\b", text, re.M)


def test_the_native_module_needs_neither_torch_nor_cuda(full_wheel: FullWheel) -> None:
    """One build serves every torch, and is imported where there is no driver."""
    (module,) = (full_wheel.folder / "rpsft_kernels").glob("_native*.so")
    names = needed_libraries(module.read_bytes())
    # What every Linux has, and what comes with every C++ compiler.
    system = ("libstdc++.", "libm.", "libgcc_s.", "libc.", "libpthread.", "libdl.", "ld-linux")
    assert [name for name in names if not name.startswith(system)] == []


def test_a_second_build_gives_the_same_bytes(full_wheel: FullWheel, tmp_path: Path) -> None:
    """Of every tenth variant, in another folder."""
    sample = list(list_variants("sm_90", True, rank_classes()))[::10]
    again = tmp_path / "again"
    build_kernels("9.0", again, jobs=2, only=";".join(variant.label() for variant in sample))
    entries = {entry["id"]: entry for entry in json.loads((again / aot_library.MANIFEST).read_text())["kernels"]}
    assert set(entries) >= {aot_library.kernel_id(variant, "sm_90a") for variant in sample}
    first = {entry["id"]: entry for entry in full_wheel.manifest()["kernels"]}
    for identity, entry in entries.items():
        assert first[identity] == entry
        assert (full_wheel.kernels / entry["file"]).read_bytes() == (again / entry["file"]).read_bytes()
