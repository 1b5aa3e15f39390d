"""Kernels for gfx942: packed and checked like the others, launched by nothing yet."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpsft_kernels.ops.triton.aot import library as aot_library
from rpsft_kernels.ops.triton.aot.build import build_kernels, main
from rpsft_kernels.ops.triton.aot.check import check_kernels
from rpsft_kernels.ops.triton.machine_code.cubin import read_hsaco
from rpsft_kernels.ops.triton.variants import ARGUMENTS, SPECIALISED, list_variants

pytestmark = pytest.mark.xdist_group("aot")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One kernel of each kind."""
    folder = tmp_path_factory.mktemp("amd") / "kernels"
    first = {variant.kernel: variant.label() for variant in reversed(list(list_variants("gfx942", False, (128,))))}
    build_kernels("gfx942", folder, ranks=(128,), jobs=1, only=";".join(first.values()))
    return folder


def test_each_kind_is_compiled_and_checked(kernels: Path) -> None:
    entries = json.loads((kernels / aot_library.MANIFEST).read_text())["kernels"]
    # The others are for Hopper.
    assert {entry["kernel"] for entry in entries} == set(ARGUMENTS) - {*SPECIALISED, "round"}
    assert check_kernels(kernels).findings == []
    for entry in entries:
        assert (entry["arch"], entry["format"]) == ("gfx942", "hsaco")
        assert read_hsaco((kernels / entry["file"]).read_bytes()) == ("gfx942", {entry["entry"]})


def test_other_code_is_told_apart(kernels: Path) -> None:
    manifest = json.loads((kernels / aot_library.MANIFEST).read_text())
    image = bytearray((kernels / manifest["kernels"][0]["file"]).read_bytes())
    # gfx90a's machine in the flags of the header.
    image[48] = 0x3F
    with pytest.raises(ValueError, match=r"image: got an ELF machine 224 with flags 0x\w*3f, expected 224 of gfx942"):
        read_hsaco(bytes(image))
    with pytest.raises(ValueError, match="image: got an ELF machine 0 with flags 0x0"):
        read_hsaco(b"nothing of the sort")


def test_a_build_says_that_nothing_launches_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--arch", "gfx942", "--output", str(tmp_path / "kernels"), "--rank", "32", "--only", "squares*"]
    assert main([*command, "--jobs", "1"]) == 0
    assert "gfx942: packed, but nothing launches these yet: on AMD Triton compiles" in capsys.readouterr().out
    library = aot_library.Library.open(tmp_path / "kernels")
    assert library.generations == []
