"""The checker: silent about what was built, and whatever is changed is named."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rpsft_kernels.ops.triton.aot import compile as aot_compile
from rpsft_kernels.ops.triton.aot import library as aot_library
from rpsft_kernels.ops.triton.aot.build import main as build
from rpsft_kernels.ops.triton.aot.build import wanted_variants
from rpsft_kernels.ops.triton.aot.check import check_kernels
from rpsft_kernels.ops.triton.aot.limits import check_limits
from rpsft_kernels.ops.triton.machine_code.cubin import nvidia_tools, read_cubin
from rpsft_kernels.ops.triton.tile_table import tile_table
from rpsft_kernels.tools.cli import main
from sass_text import cubin

pytestmark = pytest.mark.xdist_group("aot")
Change = Callable[[Path, list[dict[str, Any]]], None]


def test_what_was_built_passes(kernels: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checked = check_kernels(kernels)
    assert checked.findings == []
    assert not checked.complete
    assert main(["kernels", "--check", str(kernels)]) == 0
    assert re.search(r"\d+ kernels \(a selection of the variants.*\) for sm_80, sm_90a", capsys.readouterr().out)


def of_arch(entries: list[dict[str, Any]], arch: str, kernel: str = "gradient") -> dict[str, Any]:
    return next(entry for entry in entries if entry["arch"] == arch and entry["kernel"] == kernel)


def write(folder: Path, entry: dict[str, Any], image: bytes) -> None:
    """Other code for an entry, with a digest that is right."""
    entry["sha256"] = hashlib.sha256(image).hexdigest()
    entry["file"] = f"{entry['sha256'][:20]}.{entry['format']}"
    (folder / entry["file"]).write_bytes(image)


def flip_a_byte(folder: Path, entries: list[dict[str, Any]]) -> None:
    path = folder / of_arch(entries, "sm_90a", "hopper_gradient")["file"]
    image = bytearray(path.read_bytes())
    image[len(image) // 2] ^= 1
    path.write_bytes(image)


def delete_a_file(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / of_arch(entries, "sm_90a", "hopper_pull")["file"]).unlink()


def swap_architectures(folder: Path, entries: list[dict[str, Any]]) -> None:
    write(
        folder,
        of_arch(entries, "sm_90a", "squares"),
        (folder / of_arch(entries, "sm_80", "squares")["file"]).read_bytes(),
    )


def take_another_kernel(folder: Path, entries: list[dict[str, Any]]) -> None:
    write(folder, of_arch(entries, "sm_80"), (folder / of_arch(entries, "sm_80", "squares")["file"]).read_bytes())


def no_longer_specific(folder: Path, entries: list[dict[str, Any]]) -> None:
    """sm_90 instead of sm_90a: the same but for the instructions that only 9.0 has."""
    source = folder / of_arch(entries, "sm_80", "squares")["ptx"]["file"]
    target = folder.parent / "plain.cubin"
    subprocess.run([nvidia_tools() / "ptxas", "-arch=sm_90", source, "-o", target], check=True)
    write(folder, of_arch(entries, "sm_90a", "squares"), target.read_bytes())


def no_machine_code(folder: Path, entries: list[dict[str, Any]]) -> None:
    write(folder, of_arch(entries, "sm_80"), b"\x7fELF and so on")


def drop_an_entry(folder: Path, entries: list[dict[str, Any]]) -> None:
    entries.remove(of_arch(entries, "sm_90a", "squares"))


def repeat_an_entry(folder: Path, entries: list[dict[str, Any]]) -> None:
    entries.append(of_arch(entries, "sm_90a", "squares"))


def add_a_stranger(folder: Path, entries: list[dict[str, Any]]) -> None:
    entries.append(of_arch(entries, "sm_90a", "squares") | {"id": "0" * 20})


def add_a_file(folder: Path, entries: list[dict[str, Any]]) -> None:
    (folder / "extra.cubin").write_bytes(b"")


def pack_otherwise(folder: Path, entries: list[dict[str, Any]]) -> None:
    of_arch(entries, "sm_90a", "hopper_pull")["layout"][1] = [4, 8]


def drop_a_parameter(folder: Path, entries: list[dict[str, Any]]) -> None:
    of_arch(entries, "sm_90a", "hopper_pull")["layout"].pop()


def swap_arguments(folder: Path, entries: list[dict[str, Any]]) -> None:
    arguments = of_arch(entries, "sm_90a", "hopper_pull")["arguments"]
    arguments[0], arguments[4] = arguments[4], arguments[0]


def other_ptx(folder: Path, entries: list[dict[str, Any]]) -> None:
    ptx = of_arch(entries, "sm_80", "squares")["ptx"]
    text = (folder / ptx["file"]).read_text().replace(".target sm_80", ".target sm_86").encode()
    ptx |= {"file": "other.ptx", "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "other.ptx").write_bytes(text)


def take_what_breaks_its_rules(folder: Path, entries: list[dict[str, Any]]) -> None:
    """A kernel as Triton 3.8.0 compiles it, which overwrites what a product may still read."""
    write(folder, of_arch(entries, "sm_90a"), cubin("3.8.0", "gradient"))


def take_a_specialised_one_that_breaks_them(folder: Path, entries: list[dict[str, Any]]) -> None:
    write(folder, of_arch(entries, "sm_90a", "hopper_gradient"), cubin("3.8.0", "gradient"))


def take_a_plain_one(folder: Path, entries: list[dict[str, Any]]) -> None:
    """It breaks no rule, but it is not divided into producer and consumers."""
    write(folder, of_arch(entries, "sm_90a", "hopper_pull"), cubin("3.8.0", "pull"))


def claim(name: str, value: Any, kernel: str = "hopper_gradient") -> Change:
    def change(folder: Path, entries: list[dict[str, Any]]) -> None:
        of_arch(entries, "sm_90a", kernel)[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (flip_a_byte, r"\(hopper_gradient, sm_90a\): \w+\.cubin has another sha256 than the manifest says"),
        (delete_a_file, r"\(hopper_pull, sm_90a\): \w+\.cubin does not exist"),
        (swap_architectures, r"\(squares, sm_90a\): architecture: \w+\.cubin has sm_80, the manifest says sm_90a"),
        (no_longer_specific, r"\(squares, sm_90a\): architecture: \w+\.cubin has sm_90, the manifest says sm_90a"),
        (take_another_kernel, r"entry: \w+\.cubin has squares_kernel, the manifest says gradient_kernel"),
        (take_another_kernel, r"parameters: \w+\.cubin has .*\[32, 8\]\], the manifest says .*\[40, 8\]\]"),
        (no_machine_code, r"\(gradient, sm_80\): path: (cuobjdump cannot read )?\w+\.cubin"),
        (drop_an_entry, r"^squares\(block=1024.*\): 0 entries with the id \w+, expected one"),
        (repeat_an_entry, r"^squares\(block=1024.*\): 2 entries with the id"),
        (add_a_stranger, r"^0{20} \(squares, sm_90a\): is none of the kernels that the manifest's"),
        (add_a_file, r"^extra\.cubin: no entry of the manifest describes it"),
        (pack_otherwise, r"\(hopper_pull, sm_90a\): layout is \[\[0, 8\], \[4, 8\].*, and a launch packs"),
        (pack_otherwise, r"parameters: \w+\.cubin has \[\[0, 8\], \[8, 8\].*, the manifest says \[\[0, 8\], \[4, 8\]"),
        (drop_a_parameter, r"parameters: \w+\.cubin has .*\[48, 8\]\], the manifest says .*\[40, 8\]\]"),
        (swap_arguments, r"\(hopper_pull, sm_90a\): arguments are \[\('scales', '\*fp32'\)"),
        (other_ptx, r"\(squares, sm_80\): PTX: target is sm_86, expected sm_80"),
        (
            take_what_breaks_its_rules,
            r"\(gradient, sm_90a\): may compute wrong numbers: gradient_kernel: .* writes R.* while HGMMA",
        ),
        (
            take_a_specialised_one_that_breaks_them,
            r"\(hopper_gradient, sm_90a\): may compute wrong numbers: gradient_kernel: .* writes R.* while HGMMA",
        ),
        (
            take_a_plain_one,
            r"\(hopper_pull, sm_90a\): may be slow: no USETMAXREG\.DEALLOC with 40 registers",
        ),
        (claim("registers", 300), r"\(hopper_gradient, sm_90a\): 300 registers a thread, of 255"),
        (claim("registers", 8), r"registers: \w+\.cubin has 168, the manifest says 8"),
        (
            claim("registers", 8, "gradient"),
            r"\(gradient, sm_90a\): registers: \w+\.cubin has \d+, the manifest says 8",
        ),
        (claim("spilled", 16), r"spills 16 bytes a thread into local memory"),
        # The consumers alone: the producer's warps count too.
        (claim("threads", 256), r"\(hopper_gradient, sm_90a\): threads of a block: \w+\.cubin has 384, .* says 256"),
        (claim("threads", 64, "gradient"), r"threads of a block: \w+\.cubin has 256, the manifest says 64"),
        (claim("shared", 300 << 10), r"307200 bytes of shared memory, of 232448 that a block has"),
        (claim("blocks_per_sm", 5), r"blocks_per_sm is 5, expected 1"),
        (claim("blocks_per_sm", 2), r"2 resident blocks take 129024 registers, of 65536 of a multiprocessor"),
        (claim("constants", {}), r"constants is \{\}, expected \{'GRAD_TYPE'"),
        (claim("constants", {}, "round"), r"constants is \{\}, expected \{'BLOCK': 4096\}"),
    ],
)
def test_what_is_wrong_is_named(change: Change, finding: str, kernels: Path, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    shutil.copytree(kernels, folder)
    manifest = json.loads((folder / aot_library.MANIFEST).read_text())
    change(folder, manifest["kernels"])
    (folder / aot_library.MANIFEST).write_text(json.dumps(manifest))
    findings = check_kernels(folder).findings
    assert any(re.search(finding, found) for found in findings), findings
    assert main(["kernels", "--check", str(folder)]) == 1


def test_residents_must_fit_together() -> None:
    good: dict[str, Any] = {
        "kernel": "project",
        "arch": "sm_90a",
        "registers": 128,
        "spilled": 0,
        "maximal_registers": 128,
        "threads": 256,
        "blocks_per_sm": 2,
        "shared": 113 << 10,
    }
    assert list(check_limits(good)) == []
    for change, message in (
        ({"shared": 114 << 10}, "2 resident blocks take 235520 bytes of shared memory, of 233472 of a multiprocessor"),
        ({"registers": 129, "maximal_registers": 255}, "2 resident blocks take 69632 registers, of 65536"),
        ({"maximal_registers": 120}, "128 registers a thread, more than the 120 that it was allowed"),
        ({"blocks_per_sm": 9, "registers": 16, "shared": 0}, "9 resident blocks have 2304 threads, of 2048"),
        ({"arch": "sm_86"}, "115712 bytes of shared memory, of 101376 that a block has"),
    ):
        assert any(message in finding for finding in check_limits(good | change)), message


@pytest.fixture
def fresh_tables() -> Iterator[Callable[[], None]]:
    """Forgets the tile tables that were read, now and after the test."""
    yield tile_table.cache_clear
    tile_table.cache_clear()


def test_what_a_gpu_has_not_is_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_tables: Callable[[], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A tile table whose residents do not fit: Blackwell's shapes where a block has 99 KiB."""
    table = json.loads(Path(aot_library.__file__).parents[1].joinpath("tiles", "sm_100.json").read_text())
    path = tmp_path / "table.json"
    path.write_text(json.dumps(table | {"architecture": "sm_86"}))
    monkeypatch.setenv("RPSFT_TILES", str(path))
    fresh_tables()
    only = "project(weight_type=bf16, base_type=bf16, basis_type=bf16, aligned=True, even=True*;squares*"
    command = ["--arch", "8.6", "--output", str(tmp_path / "kernels"), "--rank", "768", "--jobs", "1", "--only", only]
    said = r"project\(.*\) for sm_86: .*\d+ bytes of shared memory, of 101376"
    monkeypatch.setenv("RPSFT_STRICT", "1")
    with pytest.raises(SystemExit, match=rf"^strict: 1 of 2 kernels cannot be kept, .*\(left out: {said}"):
        build(command)
    assert not (tmp_path / "kernels").exists()
    monkeypatch.delenv("RPSFT_STRICT")
    capsys.readouterr()
    assert build(command) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"^left out: {said}", printed, re.M)
    assert re.search(r"1 kernels in 3 files, 1 left out, ", printed)
    manifest = json.loads((tmp_path / "kernels" / aot_library.MANIFEST).read_text())
    (left_out,) = manifest["left_out"]
    (variant,) = [v for v in wanted_variants("sm_86", (768,), only) if v.kernel == "project"]
    assert (left_out["id"], left_out["label"]) == (aot_library.kernel_id(variant, "sm_86"), variant.label())
    assert [entry["kernel"] for entry in manifest["kernels"]] == ["squares"]
    checked = check_kernels(tmp_path / "kernels")
    assert (checked.findings, checked.left_out) == ([], 1)
    assert "a selection of the variants, 1 left out as the manifest says" in str(checked)
    library = aot_library.Library.open(tmp_path / "kernels")
    assert re.search(r"sm_86 +1 kernels in 2 files, 1 left out", library.summary())
    device = aot_library.Device(86, 99 << 10)
    assert library.find(variant, device) is None
    reason = library.explain_no_match(variant, device)
    assert reason is not None
    assert reason.startswith(f"left out of the sm_86 kernels: {left_out['reason']}")
    with pytest.raises(SystemExit, match="RPSFT_AOT_PREBUILT: .* leaves 1 kernels out, expected none"):
        build([*command, "--prebuilt", str(tmp_path / "kernels"), "--strict"])
    # A kernel may be left out only if something asks for it.
    manifest["left_out"].append(left_out | {"id": "0" * 20})
    manifest["kernels"].append(manifest["kernels"][0] | {"id": left_out["id"]})
    (tmp_path / "kernels" / aot_library.MANIFEST).write_text(json.dumps(manifest))
    findings = check_kernels(tmp_path / "kernels").findings
    assert any("1 entries with the id" in found and "1 that leave it out, expected one" in found for found in findings)
    assert any(re.search(r"^0{20} \(project.*is left out, but nothing asks for it", found) for found in findings)


def test_warps_that_would_wait_for_registers_for_ever_are_left_out() -> None:
    good: dict[str, Any] = {
        "kernel": "hopper_pull",
        "arch": "sm_90a",
        "registers": 168,
        "spilled": 0,
        "maximal_registers": 168,
        "threads": 384,
        "blocks_per_sm": 1,
        "shared": 0,
    }
    assert list(check_limits(good)) == []
    assert list(check_limits(good | {"registers": 160})) == [
        "hangs: 384 threads with 160 registers each start with 61440, and its warps wait until they have 64512"
    ]
    assert list(check_limits(good | {"kernel": "pull", "registers": 160})) == []


def test_code_that_breaks_the_rules_of_its_registers_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good: dict[str, Any] = {
        "kernel": "project",
        "arch": "sm_90a",
        "registers": 128,
        "spilled": 0,
        "maximal_registers": 128,
        "threads": 256,
        "blocks_per_sm": 1,
        "shared": 0,
    }
    monkeypatch.setattr(aot_compile, "scan_cubin", lambda image: [f"{image.decode()} is written", "another"])
    assert list(aot_compile._faults(good, b"R24")) == [
        "its machine code may compute wrong numbers: R24 is written (and 1 more of the kind)"
    ]
    # No other GPU has such products.
    assert list(aot_compile._faults(good | {"arch": "sm_100a"}, b"R24")) == []


def test_a_wheel_without_its_launcher(kernels: Path, tmp_path: Path) -> None:
    path = tmp_path / "rpsft_kernels-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for file in kernels.iterdir():
            wheel.write(file, f"rpsft_kernels/kernels/{file.name}")
    (finding,) = check_kernels(path).findings
    assert "carries no native module, which is what launches kernels" in finding


def test_there_must_be_something_to_check(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"place: .* carries no kernels: it has no manifest\.json"):
        main(["kernels", "--check", str(tmp_path)])
    (tmp_path / "other.whl").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="place: .* is neither a folder of kernels nor a wheel"):
        check_kernels(tmp_path / "other.whl")


def test_a_place_that_is_not_there_is_told_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="place: .* is not there; python -m rpsft_kernels kernels --build makes"):
        check_kernels(tmp_path / "absent.whl")
    with pytest.raises(ValueError, match="checking kernels takes the package triton"):
        check_kernels(tmp_path)


def test_what_is_no_machine_code_is_refused(kernels: Path) -> None:
    with pytest.raises(ValueError, match=r"path: cuobjdump cannot read manifest\.json"):
        read_cubin(kernels / aot_library.MANIFEST)
