"""Anchors on disk: one safetensors file with a JSON description in its metadata.

Fields that were added since the first version (``checksums`` and ``share`` in a record, ``CHECKSUM`` in the metadata)
are ignored by versions that do not know them, and may be absent. A file with random subspaces (``random_seed`` in a
record) has format version 2, so that no version of this package takes a control for the singular subspaces of W0.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checks import DTYPES, dtype_name
from ..distributed.shard import Shard
from ..low_rank.start import AdapterStart, name_pieces
from .anchor import Anchor
from .checksums import StoredPiece, blank_checksums, checksum_bytes, write_piece
from .fingerprint import Fingerprint
from .whole_file import check_regular, write_whole

FORMAT = "rpsft_kernels.anchors.collection"
CHECKSUM = f"{FORMAT}.crc32"
VERSION = 1
VERSION_OF_CONTROLS = 2

PIECES = {"base": ("left", "right", "base"), "block": ("left", "right", "block"), "full": ("base",)}
DTYPE_OF = {dtype_name(dtype): dtype for dtype in DTYPES}
_SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
CHECKPOINT_ADVICE = (
    "a model's checkpoint holds no anchors: on resume load those that were saved when the pretrained model was "
    "anchored (Anchors.load(their path)), as anchors of the checkpoint would restart R at 0"
)


@dataclass(frozen=True)
class Contents:
    """The contents of a file: anchors by weight name, the fingerprints that are known, and the skipped parameters."""

    anchors: Mapping[str, Anchor]
    fingerprints: Mapping[str, Fingerprint]
    skipped: Mapping[str, str]


def write_anchors(
    path: str | os.PathLike[str],
    contents: Contents,
    left_out: Collection[tuple[str, str]] = (),
    save_id: str | None = None,
) -> None:
    """Write the file whole or not at all (:func:`write_whole`), with checksums of its description and its pieces.

    Args:
        path: The file.
        contents: The anchors, fingerprints and skipped parameters to write.
        left_out: (weight, piece) of tensors that another file of the same save holds.
        save_id: The same in all files of one sharded save.

    Raises:
        ValueError: ``path`` is a folder, a device or a pipe, or lies in a folder that does not exist.
        OSError: the file cannot be written, for want of space for example.
    """
    left_out_of = {name: [piece for owner, piece in left_out if owner == name] for name in contents.anchors}
    records = {
        name: _record(name, anchor, contents.fingerprints.get(name), left_out_of[name])
        for name, anchor in contents.anchors.items()
    }
    description = {
        "format": FORMAT,
        "version": VERSION if all(a.random_seed is None for a in contents.anchors.values()) else VERSION_OF_CONTROLS,
        "weights": list(records.values()),
        "skipped": dict(contents.skipped),
        "save_id": save_id,
    }
    pieces = _pieces(contents.anchors, left_out)
    for name, piece, tensor in pieces:
        records[name]["checksums"][piece] = blank_checksums(tuple(tensor.shape), tensor.element_size())
    with write_whole(path) as file:
        # The checksums are known when the pieces have gone to the file, one after the other, and have a fixed width.
        file.write(_header(description, pieces))
        for name, piece, tensor in pieces:
            records[name]["checksums"][piece] = write_piece(file, tensor.to("cpu").contiguous())
        file.seek(0)
        file.write(_header(description, pieces))


class AnchorFile:
    """One file that :func:`write_anchors` wrote, open for reading; a context manager.

    Attributes:
        has_checksums: whether what is read is checked; files of earlier versions have no checksums.

    Raises:
        ValueError: it is no such file, of another version, damaged or incomplete; the message names the path.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"path: got the folder {str(self.path)!r}, expected a file that Anchors.save wrote")
        check_regular(self.path, self.path)
        try:
            self._open = safe_open(self.path, framework="pt", device="cpu")
            self._file: Any = self._open.__enter__()  # type: ignore[no-untyped-call, unused-ignore]
        except SafetensorError as error:
            raise ValueError(
                f"{self.path}: got no readable safetensors file ({error}), expected one from Anchors.save; "
                + CHECKPOINT_ADVICE
            ) from error
        metadata = self._file.metadata() or {}
        self._description = _description(self.path, metadata)
        self.records = _records(self.path, self._description)
        self.has_checksums = _check_description(self.path, metadata, self.records)
        self._keys = set(self._file.keys())
        _check_tensors(self.path, self._keys, self.records)

    @property
    def skipped(self) -> dict[str, str]:
        return dict(self._description["skipped"])

    @property
    def save_id(self) -> str | None:
        """An identifier that all files of one sharded save share."""
        return self._description.get("save_id")

    def shard(self, name: str) -> Shard:
        """Return the shard of the weight that the file's pieces belong to."""
        record = self.records[name]
        return _shard_from_json(tuple(record["shape"]), record.get("part"))

    def has(self, name: str, piece: str) -> bool:
        return name in self.records and _key(name, piece) in self._keys

    def read(self, name: str, piece: str) -> StoredPiece:
        """Return a piece, of which the rows that are asked for are read into memory alone.

        Raises:
            ValueError: the record has no checksums of the piece, though the file has checksums.
        """
        checksums = None
        if self.has_checksums:
            checksums = self.records[name].get("checksums", {}).get(piece, "none")
        return StoredPiece(self._file.get_slice(_key(name, piece)), checksums)

    def fingerprint(self, name: str) -> Fingerprint | None:
        record = self.records[name].get("fingerprint")
        try:
            return None if record is None else Fingerprint.from_json(record)
        except ValueError as error:
            raise ValueError(f"{self.path}: {name}: {error}") from error

    def __enter__(self) -> AnchorFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.__exit__(None, None, None)  # type: ignore[no-untyped-call, unused-ignore]


def _record(name: str, anchor: Anchor, fingerprint: Fingerprint | None, left_out: list[str]) -> dict[str, Any]:
    record = {
        "name": name,
        "shape": list(anchor.shape),
        "dtype": dtype_name(anchor.weight_dtype),
        "rank": anchor.rank,
        "form": anchor.form,
        "energy": anchor.energy,
        "arithmetic": anchor.arithmetic,
        "fingerprint": None if fingerprint is None else fingerprint.to_json(),
        "part": None if anchor.part is None else _shard_to_json(anchor.part),
        "left_out": left_out,
        "checksums": {},
    }
    for key, value in (("share", anchor.share), ("random_seed", anchor.random_seed)):
        if value is not None:
            record[key] = value
    if anchor.starts:
        record["starts"] = {adapter: _start_to_json(start) for adapter, start in anchor.starts.items()}
    return record


def _start_to_json(start: AdapterStart) -> dict[str, Any]:
    return {"scaling": start.scaling, "pieces": list(start.pieces())}


def pieces_of_starts(record: Mapping[str, Any]) -> list[str]:
    """List the pieces of a weight's record that belong to the starts of adapters."""
    starts = record.get("starts", {})
    return [f"start.{adapter}.{piece}" for adapter, start in starts.items() for piece in start["pieces"]]


def _check_starts(record: Mapping[str, Any]) -> None:
    starts = record.get("starts", {})
    if not isinstance(starts, dict):
        raise ValueError("starts: got none by adapter, expected an object; the record is damaged")
    for adapter, start in starts.items():
        pieces = start.get("pieces") if isinstance(start, dict) else None
        if not isinstance(pieces, list) or not {*map(str, pieces)} <= {"up", "down", "scale"} or not pieces:
            raise ValueError(f"starts: got {start!r} for {adapter}, expected its pieces; the record is damaged")
        if not isinstance(start.get("scaling"), float) or not math.isfinite(start["scaling"]):
            raise ValueError(f"starts: got {start!r} for {adapter}, expected its scaling; the record is damaged")


def _shard_to_json(shard: Shard) -> dict[str, Any]:
    return {
        "rows": list(shard.rows),
        "cols": list(shard.cols),
        "flat": None if shard.flat is None else list(shard.flat),
        "alone": shard.unsharded,
    }


def _shard_from_json(shape: tuple[int, int], record: Any) -> Shard:
    if record is None:
        return Shard.whole(shape)
    rows, cols = (_span(record, key, size) for key, size in zip(("rows", "cols"), shape, strict=True))
    flat = None if record["flat"] is None else _span(record, "flat", shape[0] * shape[1])
    shard = Shard(shape, rows, cols, flat, bool(record["alone"]))
    if flat is not None and Shard.range(shape, *flat).bounds != shard.bounds:
        raise ValueError(f"part: got {record!r}, expected the rows and columns that the range {flat} touches")
    return shard


def _span(part: Any, key: str, size: int) -> tuple[int, int]:
    span = part[key]
    if not (isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span)):
        raise ValueError(f"part: got {key} {span!r}, expected two ints")
    if not 0 <= span[0] <= span[1] <= size:
        raise ValueError(f"part: got {key} {span!r}, expected a range within 0 and {size}")
    return span[0], span[1]


def _pieces(anchors: Mapping[str, Anchor], left_out: Collection[tuple[str, str]]) -> list[tuple[str, str, Tensor]]:
    """List (weight, piece, tensor) in the file's order: wider elements first, so that all are aligned."""
    pieces = [
        (name, piece, tensor)
        for name, anchor in anchors.items()
        for piece, tensor in {**anchor.pieces(), **name_pieces(anchor.starts)}.items()
        if (name, piece) not in left_out
    ]
    return sorted(pieces, key=lambda item: (-item[2].element_size(), _key(item[0], item[1])))


def _header(description: Mapping[str, Any], pieces: list[tuple[str, str, Tensor]]) -> bytes:
    """Write what precedes the tensors of a safetensors file: the length of the header, and the header."""
    text = json.dumps(description)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", FORMAT: text, CHECKSUM: checksum_bytes(text.encode())}}
    end = 0
    for name, piece, tensor in pieces:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[_key(name, piece)] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _key(name: str, piece: str) -> str:
    return f"{name}:{piece}"


def _description(source: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(FORMAT)
    if text is None:
        raise ValueError(
            f"{source}: got a safetensors file without {FORMAT!r} in its metadata, expected one from Anchors.save; "
            + CHECKPOINT_ADVICE
        )
    checksum = checksum_bytes(text.encode())
    if metadata.get(CHECKSUM, checksum) != checksum:
        raise _damage_error(source, f"checksum {checksum}, expected {metadata[CHECKSUM]}")
    try:
        description = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _damage_error(source, str(error)) from error
    version = description.get("version") if isinstance(description, dict) else None
    if version not in (VERSION, VERSION_OF_CONTROLS) or isinstance(version, bool):
        raise ValueError(
            f"{source}: got format version {version!r}, expected {VERSION} or {VERSION_OF_CONTROLS}: the file is of "
            "another version of this package; read it with that one, or anchor the pretrained model again"
        )
    skipped = description.get("skipped")
    if not isinstance(skipped, dict) or not all(isinstance(reason, str) for reason in skipped.values()):
        raise _damage_error(source, "skipped: no reasons by name")
    if not isinstance(description.get("save_id"), (str, type(None))):
        raise _damage_error(source, "save_id: no name")
    return dict(description)


def _check_description(source: Path, metadata: Mapping[str, str], records: Mapping[str, Mapping[str, Any]]) -> bool:
    """Return whether the file has checksums."""
    if CHECKSUM in metadata:
        return True
    if any("checksums" in record for record in records.values()):
        raise _damage_error(source, f"no {CHECKSUM!r} in the metadata, though its pieces have checksums")
    return False


def _records(source: Path, description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    damage = _damage_error(source, "weights: no list of one record per weight")
    listed = description.get("weights")
    if not isinstance(listed, list) or not listed:
        raise damage
    records: dict[str, dict[str, Any]] = {}
    for record in listed:
        name = record.get("name") if isinstance(record, dict) else None
        form = record.get("form") if isinstance(record, dict) else None
        if not isinstance(name, str) or name in records or not isinstance(form, str) or form not in PIECES:
            raise damage
        try:
            _check_record(record)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: {name}: {describe_error(error)}") from error
        records[name] = record
    return records


def _check_record(record: Mapping[str, Any]) -> None:
    """Check what is needed to read the pieces; :class:`Anchor` checks the rest."""
    shape, rank, left_out = record["shape"], record["rank"], record.get("left_out", [])
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size >= 1 for size in shape)):
        raise ValueError(f"shape: got {shape!r}, expected (m, n), two positive ints; the record is damaged")
    if type(rank) is not int or not 1 <= rank <= min(shape):
        raise ValueError(f"rank: got {rank!r}, expected an int between 1 and {min(shape)}; the record is damaged")
    if not isinstance(record["dtype"], str) or record["dtype"] not in DTYPE_OF:
        raise KeyError(record["dtype"])
    if not isinstance(left_out, list) or not all(isinstance(piece, str) for piece in left_out):
        raise ValueError(f"left_out: got {left_out!r}, expected a list of pieces; the record is damaged")
    for key in ("energy", "arithmetic"):
        record[key]
    share = record.get("share")
    if share is not None and not (isinstance(share, float) and 0.0 < share < 1.0):
        raise ValueError(f"share: got {share!r}, expected a number between 0 and 1; the record is damaged")
    if not isinstance(record.get("checksums", {}), dict):
        raise ValueError("checksums: got none by piece, expected an object; the record is damaged")
    _check_starts(record)
    _shard_from_json((shape[0], shape[1]), record.get("part"))


def _check_tensors(source: Path, present: set[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    expected = {
        _key(name, piece)
        for name, record in records.items()
        for piece in (*PIECES[record["form"]], *pieces_of_starts(record))
        if piece not in record.get("left_out", ())
    }
    for problem, keys in (("lacks", expected - present), ("has unexpected", present - expected)):
        if keys:
            raise ValueError(
                f"{source}: the file {problem} tensors {', '.join(sorted(keys))}, expected those that its "
                "description lists; save the anchors again"
            )


def _damage_error(source: Path, detail: str) -> ValueError:
    return ValueError(f"{source}: got a damaged description ({detail}); save the anchors again")


def describe_error(error: Exception) -> str:
    return f"got a damaged record (missing or unknown {error})" if isinstance(error, KeyError) else str(error)
