"""A build writes what it promises, and the same again. Its kernels are checked in test_check.py."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rpsft_kernels.ops.triton.aot import build as aot_build
from rpsft_kernels.ops.triton.aot import library as aot_library
from rpsft_kernels.ops.triton.aot.build import build_kernels, wanted_variants
from rpsft_kernels.ops.triton.aot.compile import Kernel, LeftOut, parameter_table
from rpsft_kernels.ops.triton.aot.targets import BY_ARCH, Compatibility
from rpsft_kernels.ops.triton.variants import SPECIALISED, Variant, list_variants
from rpsft_kernels.tools.cli import main
from wheels import without

# One worker for what shares the built folder.
pytestmark = pytest.mark.xdist_group("aot")
REPOSITORY = Path(__file__).resolve().parents[4]


def manifest(folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((folder / aot_library.MANIFEST).read_text())
    return loaded


def test_without_torch_there_is_no_package(tmp_path: Path) -> None:
    """Or else the test below does not show what it is to show."""
    absent = without(tmp_path, "torch")
    run = subprocess.run(
        [sys.executable, "-c", "import rpsft_kernels"], env={**os.environ, "PYTHONPATH": absent}, capture_output=True
    )
    assert b"ModuleNotFoundError: torch is absent" in run.stderr


def test_descriptors_live_in_scratch_memory(kernels: Path) -> None:
    making = set()
    for entry in manifest(kernels)["kernels"]:
        size, alignment = entry["scratch"]["size"], entry["scratch"]["alignment"]
        if entry["kernel"] in SPECIALISED or entry["constants"].get("DESCRIPTOR", False):
            making.add((entry["arch"], entry["kernel"]))
            # Each is 128 bytes.
            assert size > 0 and size % 128 == 0
            assert 128 <= alignment <= 512
        else:
            assert size == 0
    assert making >= {("sm_90a", kernel) for kernel in (*SPECIALISED, "pull")}
    assert {arch for arch, _ in making} == {"sm_90a"}


def test_ptx_is_kept_of_the_newest_architecture_whose_ptx_others_can_take(kernels: Path) -> None:
    for entry in manifest(kernels)["kernels"]:
        assert ("ptx" in entry) == (entry["arch"] == "sm_80")
        if "ptx" in entry:
            text = (kernels / entry["ptx"]["file"]).read_text()
            # Drivers of CUDA 12.0 read this version already.
            assert entry["ptx"]["isa"] == "8.0"
            assert re.search(r"^\.version 8\.0$", text, re.M)
            assert re.search(r"^\.target sm_80$", text, re.M)
            assert f".entry {entry['entry']}(" in text


def test_no_path_of_this_machine_is_in_a_file(kernels: Path) -> None:
    for path in kernels.iterdir():
        for place in (REPOSITORY, Path(sys.prefix), kernels.parent):
            assert os.fsencode(place) not in path.read_bytes(), path.name


def test_two_builds_are_the_same_to_the_last_byte(kernels: Path, tmp_path: Path) -> None:
    """In another working directory, with another cache, in one process after the other, from the command line, and
    where neither torch nor anything else that it brings can be imported.
    """
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "temporary").mkdir()
    found = manifest(kernels)
    command = [sys.executable, str(REPOSITORY / "build_tools" / "compile_kernels.py"), "--arch", "9.0a 8.0"]
    command += ["--output", "again", "--rank", "32", "--jobs", "1", "--only", found["only"]]
    absent = without(tmp_path / "without", "torch", "numpy", "safetensors", "tqdm")
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary"), "PYTHONPATH": absent}
    run = subprocess.run(command, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert re.search(r"\d+ kernels in \d+ files,.* [\d.]+ MB, \d+ s; peak memory \d+ MiB in the largest", run.stdout)
    again = tmp_path / "elsewhere" / "again"
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in kernels.iterdir()}
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_largest_shapes_for_8_6_spill_nothing(tmp_path: Path) -> None:
    """Float32 bases at ranks up to 64 take the most registers there; a build leaves out what spills."""
    only = "project(*basis_type=fp32*aligned=True*;drift(basis_type=fp32*aligned=True*"
    built = build_kernels("8.6", tmp_path / "kernels", ranks=(64,), jobs=2, only=only)
    assert (built.kernels, built.left_out) == (44, 0)


def test_ids_tell_variants_and_architectures_apart() -> None:
    variants = list(list_variants("sm_90", True, (32, 768)))
    ids = {aot_library.kernel_id(variant, arch) for variant in variants for arch in ("sm_90a", "sm_80")}
    assert len(ids) == 2 * len(variants)


def test_a_library_opens_what_was_built(kernels: Path) -> None:
    library = aot_library.Library.open(kernels)
    assert [row.arch for row in library.generations] == ["sm_90a", "sm_80"]
    for table, descriptors, arch in (("sm_90", True, "sm_90a"), ("sm_80", False, "sm_80")):
        wanted = wanted_variants(table, (32,), library.manifest["only"])
        assert len(wanted) >= 8
        asked = {variant.kernel for variant in wanted}
        assert asked >= {"squares", "pull", "gradient", "full_gradient"}
        hoppers = {*SPECIALISED, "round"}
        assert asked & hoppers == (hoppers if table == "sm_90" else set())
        assert set(wanted) <= set(list_variants(table, descriptors, (32,)))
        assert {
            aot_library.kernel_id(variant, arch) for variant in wanted
        } <= library.by_id.keys() | library.left_out.keys()
    # Triton before 3.9 overwrites registers that Hopper's asynchronous products still read.
    wrong = tuple(map(int, library.manifest["versions"]["triton"].split(".")[:2])) < (3, 9)
    assert {each["arch"] for each in library.left_out.values()} == ({"sm_90a"} if wrong else set())
    # The specialised ones wait for each product before they write its registers, whichever Triton compiles them.
    assert not any(each["label"].startswith(SPECIALISED) for each in library.left_out.values())
    assert re.search(r"sm_90a +\d+ kernels in \d+ files", library.summary())
    for entry in library.manifest["kernels"]:
        assert parameter_table((kernels / entry["file"]).read_bytes(), entry["entry"])
    with pytest.raises(ValueError, match=r"has no section \.nv\.info\.absent_kernel"):
        parameter_table((kernels / library.manifest["kernels"][0]["file"]).read_bytes(), "absent_kernel")


def test_kernels_of_other_sources_are_refused(kernels: Path, tmp_path: Path) -> None:
    found = manifest(kernels)
    for change, message in (
        ({"sources": "0" * 64}, "were compiled from other sources"),
        ({"schema": 99}, "got schema 99, expected 4"),
    ):
        (tmp_path / aot_library.MANIFEST).write_text(json.dumps(found | change))
        with pytest.raises(ValueError, match=message):
            aot_library.Library.open(tmp_path)
    for content, message in (
        ([], r"manifest\.json: got list, expected a JSON object; install the package again, or build them"),
        ({k: v for k, v in found.items() if k != "kernels"}, r"kernels: got nothing, expected list"),
        (found | {"kernels": {}}, r"kernels: got dict, expected list"),
        (found | {"kernels": [{"id": "x"}]}, r"kernels\[0\]: has no arch, table, "),
        (found | {"left_out": [{"id": "x"}]}, r"left_out\[0\]: got \{'id': 'x'\}, expected id, label, arch and reason"),
        (found | {"kernels": [7]}, r"kernels\[0\]: has no id, arch, "),
    ):
        (tmp_path / aot_library.MANIFEST).write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            aot_library.Library.open(tmp_path)
    (tmp_path / aot_library.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: "):
        aot_library.Library.open(tmp_path)
    with pytest.raises(ValueError, match="carries no kernels compiled ahead of time$"):
        aot_library.Library.open(tmp_path / "absent")
    (tmp_path / aot_library.REASON).write_text("they could not be compiled: no Triton\n")
    with pytest.raises(ValueError, match="kernels compiled ahead of time: they could not be compiled: no Triton$"):
        aot_library.Library.open(tmp_path / "absent")


def test_other_options_of_the_compiler_are_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that were built here before must not pass for what the package asks for now."""
    (variant, *_) = list_variants("sm_80", False, (32,))
    before = aot_library.kernel_id(variant, "sm_80")
    monkeypatch.setattr(Variant, "options", lambda self: {"num_warps": self.warps, "enable_fp_fusion": True})
    assert aot_library.kernel_id(variant, "sm_80") != before
    assert {"variants", "compiler", "targets", "tile"} <= {path.stem for path in aot_library._KERNEL_SOURCES}


@pytest.mark.parametrize(
    ("made_for", "capability", "how"),
    [
        ("sm_80", 86, "compatible"),
        ("sm_86", 86, "exact"),
        ("sm_86", 80, None),
        ("sm_80", 90, None),
        # Tegra's are like no other's, in either direction.
        ("sm_80", 87, None),
        ("sm_86", 87, None),
        ("sm_87", 89, None),
        ("sm_87", 87, "exact"),
        ("sm_100a", 101, None),
        ("sm_100a", 110, None),
    ],
)
def test_which_machine_code_runs_where(made_for: str, capability: int, how: str | None) -> None:
    row = BY_ARCH[made_for]
    cubin, ptx = row.cubin_compatibility(capability), row.ptx_compatibility(capability)
    assert cubin == (None if how is None else Compatibility(how))
    assert ptx == (Compatibility.PTX if row.capability <= capability and not row.specific else None)


def test_a_build_replaces_builds_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="folder: .* holds something other than kernels"):
        build_kernels("8.0", tmp_path, ranks=(32,), only="squares*")
    with pytest.raises(ValueError, match="only: no variant's label matches 'nothing'"):
        build_kernels("8.0", tmp_path / "new", ranks=(32,), only="nothing")
    for arch in ("8.0", "9.0;gfx942"):
        assert main(["kernels", "--build", arch, "--output", str(tmp_path / "new"), "--only", "squares*"]) == 0
    assert "2 kernels in 3 files" in capsys.readouterr().out
    assert manifest(tmp_path / "new")["architectures"] == ["sm_90a", "gfx942"]
    amd = manifest(tmp_path / "new")["kernels"][1]
    assert (amd["format"], amd["threads"], amd["layout"]) == ("hsaco", 256, [[8 * i, 8] for i in range(5)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "new"]
    with pytest.raises(SystemExit, match=r"got '7\.0'"):
        main(["kernels", "--build", "7.0"])
    # This is an installation that only root may write.
    with pytest.raises(SystemExit, match=r"folder: .*mine/kernels cannot be written \(.*name another one \(--output\)"):
        main(["kernels", "--build", "8.0", "--output", str(tmp_path / "mine" / "kernels"), "--only", "squares*"])


def test_a_build_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line at every tenth at most, or when some seconds have passed."""
    clock = iter(range(0, 1000, 2))
    monkeypatch.setattr(aot_build.time, "monotonic", lambda: next(clock))
    lines: list[str] = []
    some: list[Kernel | LeftOut] = [Kernel({"format": "cubin"}, [b"%d" % i]) for i in range(40)]
    some[20] = LeftOut("id", "squares()", "sm_80", "spills 16 bytes")
    entries, left_out = aot_build._write_all(tmp_path, iter(some), 40, lines.append)
    assert len(entries) == 39 == len(list(tmp_path.iterdir()))
    assert left_out == [some[20]]
    assert lines[:3] == ["3 of 40 kernels, 6 s", "4 of 40 kernels, 8 s", "7 of 40 kernels, 14 s"]
    assert "left out: squares() for sm_80: spills 16 bytes" in lines
    assert 10 <= len(lines) <= 21


def test_the_native_launcher_takes_every_kernel(kernels: Path) -> None:
    """Without a driver, layouts are accepted and an empty grid is launched."""
    launcher = getattr(pytest.importorskip("rpsft_kernels._native"), "cuda", None)
    if launcher is None:
        pytest.skip("the native module has no CUDA launcher")
    for entry in manifest(kernels)["kernels"]:
        layout = [(offset, size) for offset, size in entry["layout"]]
        image = (kernels / entry["file"]).read_bytes()
        kernel = launcher.Kernel(image, entry["entry"], entry["id"], entry["threads"], entry["shared"], layout)
        kernel.launch(0, 0, (0, 1, 1), [0] * len(layout))
        with pytest.raises(ValueError, match=rf"arguments: got 1, expected {len(layout)}"):
            kernel.launch(0, 0, (0, 1, 1), [0])
