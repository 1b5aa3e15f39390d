from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import rpsft_kernels.anchors.file_format as anchor_file
from rpsft_kernels.anchors.anchor import Anchor
from rpsft_kernels.anchors.file_format import FORMAT, Contents, write_anchors
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


def _rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], None]) -> None:
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()[FORMAT])
    change(tensors, description)
    save_file(tensors, path, metadata={FORMAT: json.dumps(description)})


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
        *("name", "shape", "dtype", "rank", "form", "energy", "arithmetic", "fingerprint", "part", "left_out")
    }


def test_contents_come_back(path: Path) -> None:
    written, read = _contents(), read_anchors(path, "cpu")
    assert read.fingerprints == written.fingerprints and read.skipped == written.skipped
    for name, anchor in written.anchors.items():
        for piece, tensor in anchor.pieces().items():
            other = read.anchors[name].pieces()[piece]
            assert torch.equal(other, tensor) and other.stride() == tensor.stride()
            assert other.data_ptr() % 16 == 0


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


def test_failed_write_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()

    def torn(tensors: object, filename: Path, metadata: object) -> None:
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(anchor_file, "save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        write_anchors(path, _contents())
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_unusable_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere" / "anchors"):
        with pytest.raises(ValueError, match="path: got .* expected a file name in an existing folder"):
            write_anchors(path, _contents())
    with pytest.raises(ValueError, match="path: got the folder"):
        read_anchors(tmp_path, "cpu")
    with pytest.raises(FileNotFoundError):
        read_anchors(tmp_path / "anchors", "cpu")


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


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_other_versions(path: Path, version: object) -> None:
    _rewrite(path, lambda tensors, description: description.update(version=version))
    with pytest.raises(ValueError, match=rf"anchors.safetensors: got format version {version!r}, expected 1"):
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
