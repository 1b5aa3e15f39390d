"""Anchors on disk: one safetensors file with a JSON description in its metadata."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import DTYPES, dtype_name
from ..distributed.shard import Shard
from .anchor import Anchor
from .fingerprint import Fingerprint

FORMAT = "rpsft_kernels.anchors.collection"
VERSION = 1

PIECES = {"base": ("left", "right", "base"), "block": ("left", "right", "block"), "full": ("base",)}
DTYPE_OF = {dtype_name(dtype): dtype for dtype in DTYPES}


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
    """Write the file whole or not at all: under another name in its folder first, which is then renamed.

    Args:
        path: The file.
        contents: The anchors, fingerprints and skipped parameters to write.
        left_out: (weight, piece) of tensors that another file of the same save holds.
        save_id: The same in all files of one sharded save.

    Raises:
        ValueError: ``path`` is a folder, or lies in one that does not exist.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(
            f"path: got {str(target)!r}, expected a file name in an existing folder; create the folder first"
        )
    left_out_of = {name: [piece for owner, piece in left_out if owner == name] for name in contents.anchors}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "weights": [
            _record(name, anchor, contents.fingerprints.get(name), left_out_of[name])
            for name, anchor in contents.anchors.items()
        ],
        "skipped": dict(contents.skipped),
        "save_id": save_id,
    }
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(
            _tensors(contents.anchors, left_out), temporary, metadata={"format": "pt", FORMAT: json.dumps(description)}
        )
        # The name must not outlive the data in a crash.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


class AnchorFile:
    """One file that :func:`write_anchors` wrote, open for reading; a context manager.

    Raises:
        ValueError: it is no such file, of another version, or incomplete; the message names the path.
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise ValueError(f"path: got the folder {str(self.path)!r}, expected a file that Anchors.save wrote")
        try:
            self._open = safe_open(self.path, framework="pt", device="cpu")
            self._file: Any = self._open.__enter__()  # type: ignore[no-untyped-call, unused-ignore]
        except SafetensorError as error:
            raise ValueError(
                f"{self.path}: got no readable safetensors file ({error}), expected one from Anchors.save"
            ) from error
        self._description = _description(self.path, self._file.metadata())
        self.records = _records(self.path, self._description)
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
        """Read the shard of the weight that the file's pieces belong to."""
        record = self.records[name]
        try:
            return _shard_from_json(tuple(record["shape"]), record.get("part"))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}: {name}: {describe_error(error)}") from error

    def has(self, name: str, piece: str) -> bool:
        return name in self.records and _key(name, piece) in self._keys

    def read(self, name: str, piece: str) -> Any:
        """Return a lazy tensor: indexing it reads the indexed elements alone into memory."""
        return self._file.get_slice(_key(name, piece))

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
    return {
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
    }


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
    rows, cols, flat = (
        None if record[key] is None else tuple(map(int, record[key])) for key in ("rows", "cols", "flat")
    )
    return Shard(shape, rows, cols, flat, bool(record["alone"]))  # type: ignore[arg-type]


def _tensors(anchors: Mapping[str, Anchor], left_out: Collection[tuple[str, str]]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, anchor in anchors.items():
        for piece, tensor in anchor.pieces().items():
            if (name, piece) in left_out:
                continue
            stored = tensor.to("cpu").contiguous()
            # safetensors refuses tensors that share memory, as those of one anchor under two names do. Empty tensors
            # all have the same address, and may share it.
            storage = stored.untyped_storage().data_ptr()
            tensors[_key(name, piece)] = stored.clone() if storage in seen and stored.numel() else stored
            seen.add(storage)
    return tensors


def _key(name: str, piece: str) -> str:
    return f"{name}:{piece}"


def _description(source: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    text = (metadata or {}).get(FORMAT)
    if text is None:
        raise ValueError(
            f"{source}: got a safetensors file without {FORMAT!r} in its metadata, expected one from Anchors.save"
        )
    try:
        description = json.loads(text)
    except json.JSONDecodeError as error:
        raise _damage_error(source, str(error)) from error
    version = description.get("version") if isinstance(description, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{source}: got format version {version!r}, expected {VERSION}: the file is of another version "
            "of this package; read it with that one, or anchor the pretrained model again"
        )
    skipped = description.get("skipped")
    if not isinstance(skipped, dict) or not all(isinstance(reason, str) for reason in skipped.values()):
        raise _damage_error(source, "skipped: no reasons by name")
    return dict(description)


def _records(source: Path, description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    damage = _damage_error(source, "weights: no list of one record per weight")
    listed = description.get("weights")
    if not isinstance(listed, list) or not listed:
        raise damage
    records: dict[str, dict[str, Any]] = {}
    for record in listed:
        name = record.get("name") if isinstance(record, dict) else None
        if not isinstance(name, str) or name in records or record.get("form") not in PIECES:
            raise damage
        records[name] = record
    return records


def _check_tensors(source: Path, present: set[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    expected = {
        _key(name, piece)
        for name, record in records.items()
        for piece in PIECES[record["form"]]
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
