"""Reads anchors from one file or a folder of them; each rank reads its own shards, however they were sharded before."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributed import LocalWeight, Rect, Shard
from .anchor import Anchor
from .file_format import DTYPE_OF, PIECES, AnchorFile, Contents, words

INDEX = "anchors.json"


def read_anchors(
    path: str | os.PathLike[str],
    device: torch.device | str,
    locate: Callable[[Mapping[str, int]], Mapping[str, LocalWeight]] | None = None,
) -> Contents:
    """Read and check what :meth:`Anchors.save` wrote; every tensor in memory of its own.

    Args:
        path: A file, or the folder of a sharded save.
        device: Where the anchors go.
        locate: gives, for the rank k of each weight in the file, the weights that lie over several ranks; of the
            others the whole is read.

    Raises:
        ValueError: it is none of these, of another version, incomplete, or its values are not finite; the message
            names the path and the weight.
        FileNotFoundError: there is no such file.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(AnchorFile(file)) for file in _files(Path(path))]
        if len({file.save_id for file in files}) > 1 or any(list(f.records) != list(files[0].records) for f in files):
            raise ValueError(f"{path}: got files of different saves, expected those of one; save the anchors again")
        weights: Mapping[str, LocalWeight] = {}
        if locate is not None:
            weights = locate({name: int(record.get("rank", 1)) for name, record in files[0].records.items()})
        anchors, fingerprints = {}, {}
        for name, record in files[0].records.items():
            weight = weights.get(name)
            part = None if weight is None or weight.group is None else weight.shard
            try:
                anchors[name] = _Assembly(name, record, files, torch.device(device)).anchor(part)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {name}: {words(error)}") from error
            fingerprint = files[0].fingerprint(name)
            if fingerprint is not None:
                fingerprints[name] = fingerprint
        return Contents(anchors, fingerprints, files[0].skipped)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if not index.is_file():
        raise ValueError(f"path: got the folder {str(path)!r} without {INDEX}, expected one that Anchors.save wrote")
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["files"]
        return [path / str(name) for name in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: got a damaged index ({error}); save the anchors again") from error


class _Assembly:
    """One weight's anchor, put together from the pieces that files hold."""

    def __init__(self, name: str, record: Mapping[str, Any], files: list[AnchorFile], device: torch.device) -> None:
        self._name, self._record, self._files, self._device = name, record, files, device
        self._shape: tuple[int, int] = tuple(record["shape"])
        self._parts = [file.part(name) for file in files]

    def anchor(self, part: Shard | None) -> Anchor:
        """The anchor of ``part``, or of the whole weight."""
        record, target = self._record, Shard.whole(self._shape) if part is None else part
        pieces: dict[str, Tensor] = {}
        arithmetic = record["arithmetic"]
        for piece in PIECES[record["form"]]:
            if piece == "left":
                pieces[piece] = self._rows(piece, target.rows, [p.rows for p in self._parts])
            elif piece == "right":
                pieces[piece] = self._rows(piece, target.cols, [p.cols for p in self._parts])
            elif piece == "base":
                pieces[piece] = self._base(target)
            else:
                pieces[piece], arithmetic = self._block(target)
        return Anchor(
            **{name: tensor.to(self._device) for name, tensor in pieces.items()},
            shape=self._shape,
            weight_dtype=DTYPE_OF[record["dtype"]],
            rank=record["rank"],
            energy=record["energy"],
            arithmetic=arithmetic,
            part=part,
        )

    def _sources(self, piece: str) -> Iterator[tuple[int, Any]]:
        for i, file in enumerate(self._files):
            if file.has(self._name, piece):
                source = file.read(self._name, piece)
                self._check_shape(piece, tuple(source.get_shape()), self._parts[i])
                yield i, source

    def _check_shape(self, piece: str, shape: tuple[int, ...], part: Shard) -> None:
        rank, (rows, cols) = self._record["rank"], part.bounds.shape
        expected = {
            "left": (rows, rank),
            "right": (cols, rank),
            "base": part.local_shape,
            "block": (rank, rank) if part.numel else (0, 0),
        }[piece]
        if shape != expected:
            raise ValueError(
                f"{piece}: got shape {shape}, expected {expected} for a weight of shape {self._shape} at rank {rank}"
            )

    def _rows(self, piece: str, span: tuple[int, int], spans: list[tuple[int, int]]) -> Tensor:
        """Rows ``span`` of a basis."""
        result: Tensor | None = None
        missing = span[0]
        for i, source in sorted(self._sources(piece), key=lambda found: spans[found[0]]):
            begin, end = spans[i]
            stop = min(end, span[1])
            if result is None:
                result = source[:0].new_empty((span[1] - span[0], source.get_shape()[1]))
            if begin <= missing < stop:
                result[missing - span[0] : stop - span[0]] = source[missing - begin : stop - begin]
                missing = stop
        if result is None or missing < span[1]:
            raise ValueError(f"got no rows {missing}:{span[1]} of {piece!r} in the files; save the anchors again")
        return result

    def _base(self, target: Shard) -> Tensor:
        result: Tensor | None = None
        filled = 0
        for i, source in self._sources("base"):
            held = self._parts[i]
            if result is None:
                result = source[:0].new_empty(target.local_shape)
            offset = 0
            for rect in held.rects:
                for wanted, view in target.views(result):
                    common = rect.common(wanted)
                    if common is not None:
                        view[common.within(wanted)] = _rectangle(source, held, rect, offset, common)
                        filled += common.shape[0] * common.shape[1]
                offset += rect.shape[0] * rect.shape[1]
        if result is None or filled != target.numel:
            raise ValueError(f"got {filled} elements of 'base' in the files, expected {target.numel}; save them again")
        return result

    def _block(self, target: Shard) -> tuple[Tensor, str | None]:
        """The block of ``target``: as stored for that shard, or for a whole weight the sum of all shards' blocks."""
        found = [(self._parts[i], source[:]) for i, source in self._sources("block")]
        for part, block in found:
            if part == target or (part.is_whole and target.is_whole):
                return block.clone(), self._record["arithmetic"]
        if not target.numel:
            return found[0][1].new_empty((0, 0)), None
        total = torch.stack([block for _, block in found if block.numel()]).sum(0)
        # For another shard, zeros without an arithmetic hold the place until the block is rebuilt from the weights.
        return (total if target.is_whole else torch.zeros_like(total)), None


def _rectangle(source: Any, held: Shard, rect: Rect, offset: int, wanted: Rect) -> Tensor:
    """``wanted``, which lies in ``rect``, read from a stored shard."""
    rows, cols = wanted.within(rect)
    if held.flat is None:
        found: Tensor = source[rows, cols]
        return found
    width = rect.shape[1]
    lines: Tensor = source[offset + rows.start * width : offset + rows.stop * width]
    return lines.view(-1, width)[:, cols]
