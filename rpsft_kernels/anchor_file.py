"""Anchors on disk: one safetensors file with a JSON description in its metadata."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .anchor import Anchor
from .fingerprint import Fingerprint, dtype_name
from .weights import DTYPES

FORMAT = "rpsft_kernels.anchors"
VERSION = 1

_PIECES = {"base": ("left", "right", "base"), "block": ("left", "right", "block"), "full": ("base",)}
_DTYPES = {dtype_name(dtype): dtype for dtype in DTYPES}


@dataclass(frozen=True)
class Contents:
    """What a file holds: anchors by weight name, the fingerprints that are known, and what was left out."""

    anchors: Mapping[str, Anchor]
    fingerprints: Mapping[str, Fingerprint]
    skipped: Mapping[str, str]


def write_anchors(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write the file whole or not at all: under another name in its folder first, then renamed.

    Raises:
        ValueError: ``path`` is a folder, or lies in one that does not exist.
    """
    target = Path(path)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(
            f"path: got {str(target)!r}, expected a file name in an existing folder; create the folder first"
        )
    description = {
        "format": FORMAT,
        "version": VERSION,
        "weights": [_record(name, a, contents.fingerprints.get(name)) for name, a in contents.anchors.items()],
        "skipped": dict(contents.skipped),
    }
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        save_file(_tensors(contents.anchors), temporary, metadata={"format": "pt", FORMAT: json.dumps(description)})
        # The name must not outlive the data in a crash.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def read_anchors(path: str | os.PathLike[str], device: torch.device | str) -> Contents:
    """Read and check a file that :func:`write_anchors` wrote; every tensor in memory of its own.

    Raises:
        ValueError: the file is none of these, of another version, incomplete, or its values are not finite;
            the message names the path and the weight.
        FileNotFoundError: there is no such file.
    """
    source = Path(path)
    if source.is_dir():
        raise ValueError(f"path: got the folder {str(source)!r}, expected a file that Anchors.save wrote")
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            description = _description(source, file.metadata())
            records = _records(source, description)
            _check_tensors(source, set(file.keys()), records)
            anchors, fingerprints = {}, {}
            for name, record in records.items():
                try:
                    anchors[name] = _anchor(name, record, file, torch.device(device))
                    if record["fingerprint"] is not None:
                        fingerprints[name] = Fingerprint.from_json(record["fingerprint"])
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{source}: {name}: {_words(error)}") from error
    except SafetensorError as error:
        raise ValueError(
            f"{source}: got no readable safetensors file ({error}), expected one from Anchors.save"
        ) from error
    return Contents(anchors, fingerprints, description["skipped"])


def _record(name: str, anchor: Anchor, fingerprint: Fingerprint | None) -> dict[str, Any]:
    return {
        "name": name,
        "shape": list(anchor.shape),
        "dtype": dtype_name(anchor.weight_dtype),
        "rank": anchor.rank,
        "form": anchor.form,
        "energy": anchor.energy,
        "arithmetic": anchor.arithmetic,
        "fingerprint": None if fingerprint is None else fingerprint.to_json(),
    }


def _tensors(anchors: Mapping[str, Anchor]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, anchor in anchors.items():
        for piece, tensor in anchor.pieces().items():
            stored = tensor.to("cpu").contiguous()
            # safetensors refuses tensors that share memory, as one anchor under two names does.
            storage = stored.untyped_storage().data_ptr()
            tensors[_key(name, piece)] = stored.clone() if storage in seen else stored
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
        raise _damaged(source, str(error)) from error
    version = description.get("version") if isinstance(description, dict) else None
    if version != VERSION:
        raise ValueError(
            f"{source}: got format version {version!r}, expected {VERSION}: the file is of another version "
            "of this package; read it with that one, or anchor the pretrained model again"
        )
    skipped = description.get("skipped")
    if not isinstance(skipped, dict) or not all(isinstance(reason, str) for reason in skipped.values()):
        raise _damaged(source, "skipped: no reasons by name")
    return dict(description)


def _records(source: Path, description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    damaged = _damaged(source, "weights: no list of one record per weight")
    listed = description.get("weights")
    if not isinstance(listed, list) or not listed:
        raise damaged
    records: dict[str, dict[str, Any]] = {}
    for record in listed:
        name = record.get("name") if isinstance(record, dict) else None
        if not isinstance(name, str) or name in records or record.get("form") not in _PIECES:
            raise damaged
        records[name] = record
    return records


def _check_tensors(source: Path, present: set[str], records: Mapping[str, Mapping[str, Any]]) -> None:
    expected = {_key(name, piece) for name, record in records.items() for piece in _PIECES[record["form"]]}
    for problem, keys in (("lacks", expected - present), ("has unexpected", present - expected)):
        if keys:
            raise ValueError(
                f"{source}: the file {problem} tensors {', '.join(sorted(keys))}, expected those that its "
                "description lists; save the anchors again"
            )


def _anchor(name: str, record: Mapping[str, Any], file: Any, device: torch.device) -> Anchor:
    # copy=True: what safetensors hands out is a view of the mapped file, aligned to 8 bytes only.
    pieces = {piece: file.get_tensor(_key(name, piece)).to(device, copy=True) for piece in _PIECES[record["form"]]}
    return Anchor(
        **pieces,
        shape=tuple(record["shape"]),
        weight_dtype=_DTYPES[record["dtype"]],
        rank=record["rank"],
        energy=record["energy"],
        arithmetic=record["arithmetic"],
    )


def _damaged(source: Path, detail: str) -> ValueError:
    return ValueError(f"{source}: got a damaged description ({detail}); save the anchors again")


def _words(error: Exception) -> str:
    return f"got a damaged record (missing or unknown {error})" if isinstance(error, KeyError) else str(error)
