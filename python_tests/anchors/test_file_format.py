from __future__ import annotations

import dataclasses
import io
import json
import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rpsft_kernels.anchors.checksums as checksums
from rpsft_kernels.anchors.anchor import Anchor
from rpsft_kernels.anchors.checksums import checksum_bytes, write_piece
from rpsft_kernels.anchors.collection import Anchors
from rpsft_kernels.anchors.file_format import CHECKSUM, FORMAT, Contents, write_anchors
from rpsft_kernels.anchors.fingerprint import Fingerprint
from rpsft_kernels.anchors.load import read_anchors


def _contents() -> Contents:
    weights = {
        name: torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for name, shape in (("a.weight", (12, 9)), ("b:weight", (9, 12)), ("c", (4, 3)))
    }
    anchors = {name: Anchor.from_weight(weight, 3, keep_base=name == "a.weight") for name, weight in weights.items()}
    fingerprints = {name: Fingerprint.of(name, weight) for name, weight in weights.items() if name != "c"}
    return Contents(anchors, fingerprints, {"a.bias": "1-D"})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "anchors.safetensors"
    write_anchors(path, _contents())
    return path


def _describe(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        description: dict[str, Any] = json.loads(file.metadata()[FORMAT])
    return description


def _rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    """Change a file, and compute its checksums anew."""
    tensors, description = load_file(path), _describe(path)
    change(tensors, description)
    for record in description["weights"]:
        for piece in record.get("checksums", {}):
            stored = tensors.get(f"{record['name']}:{piece}")
            if stored is not None:
                record["checksums"][piece] = write_piece(io.BytesIO(), stored)
    text = json.dumps(description)
    save_file(tensors, path, metadata={FORMAT: text, CHECKSUM: checksum_bytes(text.encode())})


def _make_old(path: Path) -> None:
    """Rewrite a file as versions without checksums wrote it."""
    tensors, description = load_file(path), _describe(path)
    for record in description["weights"]:
        del record["checksums"]
    save_file(tensors, path, metadata={"format": "pt", FORMAT: json.dumps(description)})


def test_file_holds_unpadded_tensors_and_a_description(path: Path) -> None:
    tensors = load_file(path)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        "a.weight:left": (12, 3),
        "a.weight:right": (9, 3),
        "a.weight:base": (12, 9),
        "b:weight:left": (9, 3),
        "b:weight:right": (12, 3),
        "b:weight:block": (3, 3),
        "c:base": (4, 3),
    }
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()[FORMAT])
    assert (description["format"], description["version"]) == ("rpsft_kernels.anchors.collection", 1)
    assert description["skipped"] == {"a.bias": "1-D"}
    assert [record["name"] for record in description["weights"]] == ["a.weight", "b:weight", "c"]
    assert set(description["weights"][0]) == {
        *(
            "name",
            "shape",
            "dtype",
            "rank",
            "form",
            "energy",
            "arithmetic",
            "fingerprint",
            "part",
            "left_out",
            "checksums",
        )
    }


def test_contents_come_back(path: Path) -> None:
    written, read = _contents(), read_anchors(path, "cpu")
    assert read.fingerprints == written.fingerprints and read.skipped == written.skipped
    for name, anchor in written.anchors.items():
        for piece, tensor in anchor.pieces().items():
            other = read.anchors[name].pieces()[piece]
            assert torch.equal(other, tensor) and other.stride() == tensor.stride()
            assert other.data_ptr() % 16 == 0


def test_controls_have_a_version_that_older_readers_refuse(tmp_path: Path) -> None:
    weight = torch.randn(12, 9, generator=torch.Generator().manual_seed(0))
    plain, full = Anchor.from_weight(weight, 0.6), Anchor.from_weight(weight[:, :2], 2)
    control = dataclasses.replace(plain, random_seed=7)
    write_anchors(tmp_path / "plain", Contents({"a": plain, "b": full}, {}, {}))
    write_anchors(tmp_path / "control", Contents({"a": control, "b": full}, {}, {}))
    assert _describe(tmp_path / "plain")["version"] == 1
    description = _describe(tmp_path / "control")
    assert description["version"] == 2
    first, second = description["weights"]
    assert (first["share"], first["random_seed"], first["rank"]) == (0.6, 7, plain.rank)
    assert "share" not in second and "random_seed" not in second
    read = read_anchors(tmp_path / "control", "cpu").anchors
    assert (read["a"].share, read["a"].random_seed, read["a"].subspace) == (0.6, 7, "random")
    assert (read["b"].share, read["b"].random_seed, read["b"].subspace) == (None, None, "singular")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("share", 1.5, "share: got 1.5, expected a number between 0 and 1; the record is damaged"),
        ("share", "0.6", "share: got '0.6', expected a number between 0 and 1"),
        ("random_seed", -1, "random_seed: got -1, expected an int of at least 0"),
        ("random_seed", True, "random_seed: got True, expected an int of at least 0"),
    ],
)
def test_damaged_shares_and_seeds(path: Path, field: str, value: object, message: str) -> None:
    _rewrite(path, lambda tensors, description: description["weights"][0].update({field: value}))
    with pytest.raises(ValueError, match=rf"anchors.safetensors: a.weight: {message}"):
        read_anchors(path, "cpu")


def test_loaded_anchors_outlive_the_file(path: Path) -> None:
    read = read_anchors(path, "cpu")
    size = path.stat().st_size
    with open(path, "rb+") as file:
        file.write(b"\xff" * size)
    for name, anchor in _contents().anchors.items():
        for piece, tensor in anchor.pieces().items():
            assert torch.equal(read.anchors[name].pieces()[piece], tensor)


def test_shared_tensors_can_be_saved(tmp_path: Path) -> None:
    anchor = Anchor.from_weight(torch.randn(20, 18, generator=torch.Generator().manual_seed(1)), 16)
    write_anchors(tmp_path / "f", Contents({"a": anchor, "b": anchor}, {}, {}))
    read = read_anchors(tmp_path / "f", "cpu").anchors
    for name in ("a", "b"):
        assert all(torch.equal(read[name].pieces()[piece], tensor) for piece, tensor in anchor.pieces().items())


def test_writing_replaces_a_file_and_leaves_nothing_else(path: Path) -> None:
    path.write_bytes(b"old")
    write_anchors(path, _contents())
    assert list(read_anchors(path, "cpu").anchors) == ["a.weight", "b:weight", "c"]
    assert os.listdir(path.parent) == [path.name]


def test_a_full_disk_keeps_the_old_file(path: Path) -> None:
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large; nothing was written: .*anchors.safetensors"):
            write_anchors(path, _contents())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_unusable_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "anchors"):
        with pytest.raises(ValueError, match="path: got .* expected a file name in an existing folder"):
            write_anchors(path, _contents())
    with pytest.raises(ValueError, match="path: got the folder"):
        read_anchors(tmp_path, "cpu")
    with pytest.raises(FileNotFoundError):
        read_anchors(tmp_path / "anchors", "cpu")
    with pytest.raises(ValueError, match="path: got '/dev/null', a device, expected a regular file"):
        read_anchors(os.devnull, "cpu")


def test_other_files(path: Path) -> None:
    for content in (b"", b"not a safetensors file at all", path.read_bytes()[:-5]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"anchors.safetensors: got no readable safetensors file"):
            read_anchors(path, "cpu")
    for metadata in (None, {"format": "pt"}):
        save_file({"w": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=r"anchors.safetensors: got a safetensors file without 'rpsft_kernels"):
            read_anchors(path, "cpu")
    save_file({"w": torch.ones(2)}, path, metadata={FORMAT: "{"})
    with pytest.raises(ValueError, match=r"anchors.safetensors: got a damaged description"):
        read_anchors(path, "cpu")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_other_versions(path: Path, version: object) -> None:
    _rewrite(path, lambda tensors, description: description.update(version=version))
    with pytest.raises(ValueError, match=rf"anchors.safetensors: got format version {version!r}, expected 1 or 2"):
        read_anchors(path, "cpu")


def _poison(key: str, value: float = float("nan")) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        tensors[key][1, 1] = value

    return change


def _record(**changes: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    def change(tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        description["weights"][1].update(changes)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: t.pop("a.weight:left"), "the file lacks tensors a.weight:left, expected those"),
        (lambda t, d: t.update(extra=torch.ones(1)), "the file has unexpected tensors extra"),
        (_record(form="base"), "the file lacks tensors b:weight:base"),
        (_poison("a.weight:left"), "a.weight: left: got NaN or infinity"),
        (_poison("a.weight:base"), "a.weight: base: got NaN or infinity"),
        (_poison("b:weight:block", float("inf")), "b:weight: block: got NaN or infinity"),
        (_poison("c:base"), "c: base: got NaN or infinity"),
        (
            lambda t, d: t.update({"c:base": torch.ones(3, 4)}),
            r"c: base: got shape \(3, 4\), expected \(4, 3\)",
        ),
        (lambda t, d: t.update({"b:weight:left": torch.ones(9, 3).half()}), "b:weight: left: got float16"),
        (_record(dtype="int4"), r"b:weight: got a damaged record \(missing or unknown 'int4'\)"),
        (_record(rank=4), r"b:weight: left: got shape \(9, 3\), expected \(9, 4\)"),
        (_record(shape=None), "b:weight: "),
        (_record(energy="high"), "b:weight: energy: got 'high'"),
        (_record(energy=float("nan")), "b:weight: energy: got nan"),
        (_record(fingerprint={"name": "b"}), "b:weight: fingerprint: got "),
        (_record(name=None), r"got a damaged description \(weights"),
        (_record(name="a.weight"), r"got a damaged description \(weights"),
        (_record(form="dense"), r"got a damaged description \(weights"),
        (lambda t, d: d.update(weights=[]), r"got a damaged description \(weights"),
        (
            lambda t, d: d["weights"][1].pop("rank"),
            r"b:weight: got a damaged record \(missing or unknown 'rank'\)",
        ),
        (lambda t, d: d.update(skipped=[]), r"got a damaged description \(skipped"),
    ],
)
def test_damaged_files(path: Path, change: Callable[..., None], message: str) -> None:
    _rewrite(path, change)
    with pytest.raises(ValueError, match=r"anchors\.safetensors: " + message):
        read_anchors(path, "cpu")


_ODD_VALUES = [None, True, -1, 0, 1, 2.5, 1 << 40, "x", "", {}, [], [1], [4, 3], [1, 2, 3], [None, 1], [[]]]


def _refusal(path: Path) -> str:
    """Return why a file is refused, and nothing where it loads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Anchors.load(path)
        except ValueError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("old", [False, True])
def test_any_field_may_be_damaged(path: Path, old: bool) -> None:
    if old:
        _make_old(path)
    whole, description = path.read_bytes(), _describe(path)
    places: list[list[Any]] = [[key] for key in description]
    places += [["weights", 2, key] for key in description["weights"][2]]
    places += [["weights", 0, "fingerprint", key] for key in description["weights"][0]["fingerprint"]]
    places += [] if old else [["weights", 2, "checksums", "base"], ["weights", 2, "checksums", "base", "rows"]]
    part = {"rows": [0, 4], "cols": [0, 3], "flat": [0, 12], "alone": True}
    places += [["weights", 2, "part", key] for key in part]
    refused = 0
    for place in places:
        for value in _ODD_VALUES:
            tensors, changed = load_file(path), json.loads(json.dumps(description))
            if "part" in place[:-1]:
                changed["weights"][2]["part"] = {**part}
                tensors["c:base"] = tensors["c:base"].flatten()
            record = changed
            for key in place[:-1]:
                record = record[key]
            record[place[-1]] = value
            text = json.dumps(changed)
            crc = {} if old else {CHECKSUM: checksum_bytes(text.encode())}
            save_file(tensors, path, metadata={FORMAT: text, **crc})
            refusal = _refusal(path)
            refused += bool(refusal)
            assert not refusal or "anchors.safetensors" in refusal, (place, value)
            path.write_bytes(whole)
    assert refused > len(places) * len(_ODD_VALUES) // 2


def test_an_index_may_be_damaged(path: Path, tmp_path: Path) -> None:
    index = tmp_path / "anchors.json"
    for files in (*_ODD_VALUES, [path.name] * 2, [f"../{tmp_path.name}/{path.name}"], [str(path)], [".."], [""]):
        for content in (files, {"files": files}):
            index.write_text(json.dumps(content))
            with pytest.raises(ValueError, match="anchors.json: got |path: got the folder"):
                read_anchors(tmp_path, "cpu")
    index.write_text(json.dumps({"files": [path.name]}))
    assert list(read_anchors(tmp_path, "cpu").anchors) == ["a.weight", "b:weight", "c"]


def test_each_flipped_bit_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_BLOCK_BYTES", 64)
    write_anchors(path, _contents())
    whole, written = path.read_bytes(), _contents()
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in (*range(0, header, 5), *range(header, len(whole))):
        changed = bytearray(whole)
        changed[i] ^= 1 << i % 8
        path.write_bytes(changed)
        refusal = _refusal(path)
        if refusal:
            assert str(path) in refusal and (i < header or "the file is damaged" in refusal)
            continue
        read = read_anchors(path, "cpu")
        # The one field that nobody reads.
        assert i < header and b'"format": "pt"' not in changed
        assert read.fingerprints == written.fingerprints and read.skipped == written.skipped
        for name, anchor in written.anchors.items():
            assert repr(read.anchors[name]) == repr(anchor)
            assert all(torch.equal(read.anchors[name].pieces()[p], tensor) for p, tensor in anchor.pieces().items())


def test_a_flipped_bit_is_named(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 64
    path.write_bytes(content)
    message = r"anchors\.safetensors: b:weight: right: got rows 0:12 with checksum [0-9a-f]{8}, expected [0-9a-f]{8}"
    with pytest.raises(ValueError, match=message):
        read_anchors(path, "cpu")


def test_files_without_checksums_load_with_a_note(path: Path) -> None:
    _make_old(path)
    with pytest.warns(UserWarning, match=r"anchors\.safetensors: got a file without checksums, of an earlier") as notes:
        read = Anchors.load(path)
    assert [note.filename for note in notes] == [__file__]
    for name, anchor in _contents().anchors.items():
        assert all(torch.equal(read[name].pieces()[piece], tensor) for piece, tensor in anchor.pieces().items())
    read.save(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Anchors.load(path)


def test_checksums_do_not_go_unnoticed(path: Path) -> None:
    tensors, description = load_file(path), _describe(path)
    save_file(tensors, path, metadata={FORMAT: json.dumps(description)})
    with pytest.raises(ValueError, match=r"got a damaged description \(no 'rpsft_kernels.anchors.collection.crc32'"):
        read_anchors(path, "cpu")
    del description["weights"][0]["checksums"]["left"]
    text = json.dumps(description)
    save_file(tensors, path, metadata={FORMAT: text, CHECKSUM: checksum_bytes(text.encode())})
    with pytest.raises(ValueError, match=r"a\.weight: left: got checksums 'none', expected rows"):
        read_anchors(path, "cpu")
