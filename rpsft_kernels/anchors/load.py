"""Reads anchors from one file or a folder of them; each rank reads its own shards, however they were saved."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..costs import is_full
from ..distributed import LocalWeight, Rect, Shard
from ..distributed.shard import Span
from ..low_rank.start import AdapterStart
from .anchor import Anchor
from .checksums import StoredPiece
from .file_format import CHECKPOINT_ADVICE, DTYPE_OF, PIECES, AnchorFile, Contents, describe_error
from .make import plan_rank

INDEX = "anchors.json"
_SHARED_FACTS = ("shape", "dtype", "rank", "form", "energy", "share", "random_seed")


def read_anchors(
    path: str | os.PathLike[str],
    device: torch.device | str,
    locate: Callable[[Mapping[str, int], Collection[str]], Mapping[str, LocalWeight]] | None = None,
) -> Contents:
    """Read and check the anchors that :meth:`Anchors.save` wrote; every tensor has memory of its own.

    Args:
        path: A file, or the folder of a sharded save.
        device: Where the anchors go.
        locate: finds the weights as they lie here, given k of each weight in the file by name, and the names of those
            that were to have no W0: the work on replicated weights is divided by these. A weight that lies over
            several ranks gets the anchor of its shard, any other that of the whole.

    Raises:
        ValueError: it is no such file or folder, of another version, incomplete, or its values are damaged or not
            finite; the message names the path and the weight.
        FileNotFoundError: there is no such file.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(AnchorFile(file)) for file in _files(Path(path))]
        if len({file.save_id for file in files}) > 1 or any(_facts(f) != _facts(files[0]) for f in files):
            raise ValueError(f"{path}: got files of different saves, expected those of one; save the anchors again")
        if not all(file.has_checksums for file in files):
            warnings.warn(
                f"{path}: got a file without checksums, of an earlier version of this package: damaged values in it go "
                "unseen unless they are NaN or infinite; save the anchors again to add checksums",
                UserWarning,
                # The caller of Anchors.load.
                stacklevel=3,
            )
        weights: Mapping[str, LocalWeight] = {}
        if locate is not None:
            planned = {name: _planned_rank(record) for name, record in files[0].records.items()}
            weights = locate(planned, _planned_without_base(files[0].records, planned))
        anchors, fingerprints = {}, {}
        for name, record in files[0].records.items():
            weight = weights.get(name)
            shard = None if weight is None or weight.group is None else weight.shard
            try:
                anchors[name] = _Assembly(name, record, files, torch.device(device)).anchor(shard)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}: {name}: {describe_error(error)}") from error
            fingerprint = files[0].fingerprint(name)
            if fingerprint is not None:
                fingerprints[name] = fingerprint
        return Contents(anchors, fingerprints, files[0].skipped)


def _facts(file: AnchorFile) -> dict[str, tuple[Any, ...]]:
    """Return what all files of one save say of each weight."""
    return {name: tuple(record.get(key) for key in _SHARED_FACTS) for name, record in file.records.items()}


def _planned_rank(record: Mapping[str, Any]) -> int:
    """Return k that the work was divided by when the anchors were made, as ``Anchor.planned_rank`` does."""
    share = record.get("share")
    rank: int = record["rank"]
    return rank if share is None else plan_rank(tuple(record["shape"]), share)


def _planned_without_base(records: Mapping[str, Mapping[str, Any]], planned: Mapping[str, int]) -> set[str]:
    """Return what :meth:`AnchorOptions.without_base` did when the anchors were made."""
    if all(record["form"] != "block" for record in records.values()):
        return set()
    # Of a share of energy an anchor may be full where it was not planned so.
    candidates = {name: tuple(record["shape"]) for name, record in records.items() if record["form"] != "base"}
    return {name for name, shape in candidates.items() if not is_full((shape[0], shape[1]), planned[name])}


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    index = path / INDEX
    if not index.is_file():
        raise ValueError(
            f"path: got the folder {str(path)!r} without {INDEX}, expected one that Anchors.save wrote; "
            + CHECKPOINT_ADVICE
        )
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{index}: got a damaged index ({error}); save the anchors again") from error
    if not (isinstance(listed, list) and listed and all(isinstance(name, str) for name in listed)):
        raise ValueError(f"{index}: got a damaged index (files {listed!r}); save the anchors again")
    if len(set(listed)) < len(listed) or any(os.path.basename(name) != name for name in listed):
        raise ValueError(
            f"{index}: got files {listed!r}, expected distinct names in the folder; save the anchors again"
        )
    return [path / name for name in listed]


class _Assembly:
    """Puts one weight's anchor together from the pieces that files hold."""

    def __init__(self, name: str, record: Mapping[str, Any], files: list[AnchorFile], device: torch.device) -> None:
        self._name, self._record, self._files, self._device = name, record, files, device
        self._shape: tuple[int, int] = tuple(record["shape"])
        self._shards = [file.shard(name) for file in files]

    def anchor(self, shard: Shard | None) -> Anchor:
        """Read the anchor of ``shard``; None reads that of the whole weight."""
        record, target = self._record, Shard.whole(self._shape) if shard is None else shard
        pieces: dict[str, Tensor] = {}
        arithmetic = record["arithmetic"]
        for piece in PIECES[record["form"]]:
            if piece == "left":
                pieces[piece] = self._read_rows(piece, target.rows, [stored.rows for stored in self._shards])
            elif piece == "right":
                pieces[piece] = self._read_rows(piece, target.cols, [stored.cols for stored in self._shards])
            elif piece == "base":
                pieces[piece] = self._read_base(target)
            else:
                pieces[piece], arithmetic = self._read_block(target)
        starts = {adapter: self._read_start(adapter) for adapter in record.get("starts", {})}
        return Anchor(
            **{name: tensor.to(self._device) for name, tensor in pieces.items()},
            shape=self._shape,
            weight_dtype=DTYPE_OF[record["dtype"]],
            rank=record["rank"],
            energy=record["energy"],
            arithmetic=arithmetic,
            part=shard,
            starts=starts,
            share=record.get("share"),
            random_seed=record.get("random_seed"),
        )

    def _sources(self, piece: str) -> list[tuple[int, StoredPiece]]:
        """List the files that have ``piece``, by number."""
        sources = []
        for i, file in enumerate(self._files):
            if file.has(self._name, piece):
                with _prefix_errors(piece):
                    source = file.read(self._name, piece)
                self._check_shape(piece, source.shape, self._shards[i])
                sources.append((i, source))
        return sources

    def _read_start(self, adapter: str) -> AdapterStart:
        """Read the start of an adapter, which lies whole in one of the files."""
        stored, tensors = self._record["starts"][adapter], {}
        for piece in stored["pieces"]:
            key = f"start.{adapter}.{piece}"
            file = next((file for file in self._files if file.has(self._name, key)), None)
            if file is None:
                raise ValueError(f"got no {key!r} in the files; save the anchors again")
            with _prefix_errors(key):
                source = file.read(self._name, key)
                tensors[piece] = source.read(0, source.shape[0]).clone().to(self._device)
        return AdapterStart(stored["scaling"], **tensors)

    def _check_shape(self, piece: str, shape: tuple[int, ...], shard: Shard) -> None:
        rank, (rows, cols) = self._record["rank"], shard.bounds.shape
        expected = {
            "left": (rows, rank),
            "right": (cols, rank),
            "base": shard.local_shape,
            "block": (rank, rank) if shard.numel else (0, 0),
        }[piece]
        if shape != expected:
            raise ValueError(
                f"{piece}: got shape {shape}, expected {expected} for a weight of shape {self._shape} at rank {rank}"
            )

    def _read_rows(self, piece: str, span: Span, spans: list[Span]) -> Tensor:
        """Read the rows ``span`` of a basis, of which each file holds the rows ``spans[file]``."""
        ranges: list[tuple[StoredPiece, int, Span]] = []
        missing = span[0]
        sources = sorted(self._sources(piece), key=lambda numbered: spans[numbered[0]])
        for i, source in sources:
            begin, end = spans[i]
            stop = min(end, span[1])
            if begin <= missing < stop:
                ranges.append((source, begin, (missing, stop)))
                missing = stop
        if not sources or missing < span[1]:
            raise ValueError(f"got no rows {missing}:{span[1]} of {piece!r} in the files; save the anchors again")
        with _prefix_errors(piece):
            result = sources[0][1].allocate((span[1] - span[0], sources[0][1].shape[1]))
            for source, begin, (first, stop) in ranges:
                for row, rows in source.blocks(first - begin, stop - begin):
                    at = row + begin - span[0]
                    result[at : at + len(rows)] = rows
        return result

    def _read_base(self, target: Shard) -> Tensor:
        sources = self._sources("base")
        # What is missing is found before memory for it is asked for.
        found = sum(
            common.shape[0] * common.shape[1]
            for i, _ in sources
            for rect in self._shards[i].rects
            for wanted in target.rects
            if (common := rect.common(wanted)) is not None
        )
        if not sources or found != target.numel:
            raise ValueError(f"got {found} elements of 'base' in the files, expected {target.numel}; save them again")
        with _prefix_errors("base"):
            result = sources[0][1].allocate(target.local_shape)
            for i, source in sources:
                stored, offset = self._shards[i], 0
                for rect in stored.rects:
                    for wanted, view in target.views(result):
                        common = rect.common(wanted)
                        if common is not None:
                            _read_rectangle(source, stored, rect, offset, common, view[common.within(wanted)])
                    offset += rect.shape[0] * rect.shape[1]
        return result

    def _read_block(self, target: Shard) -> tuple[Tensor, str | None]:
        """Read the block of ``target``: as stored for that shard, or for a whole weight the sum of all blocks."""
        with _prefix_errors("block"):
            blocks = [(self._shards[i], source.read(0, source.shape[0])) for i, source in self._sources("block")]
        if not blocks:
            raise ValueError("got no 'block' in the files; save the anchors again")
        for shard, block in blocks:
            if shard == target or (shard.is_whole and target.is_whole):
                return block.clone(), self._record["arithmetic"]
        if not target.numel:
            return blocks[0][1].new_empty((0, 0)), None
        total = torch.stack([block for _, block in blocks if block.numel()]).sum(0)
        # For another shard, zeros without an arithmetic hold the place until the block is rebuilt from the weights.
        return (total if target.is_whole else torch.zeros_like(total)), None


def _read_rectangle(source: StoredPiece, stored: Shard, rect: Rect, offset: int, wanted: Rect, out: Tensor) -> None:
    """Read ``wanted`` from ``rect`` of a stored shard, whose elements begin at ``offset`` in a flat ``source``."""
    rows, cols = wanted.within(rect)
    if stored.flat is None:
        for row, block in source.blocks(rows.start, rows.stop):
            out[row - rows.start : row - rows.start + len(block)] = block[:, cols]
    else:
        width = rect.shape[1]
        lines = source.read(offset + rows.start * width, offset + rows.stop * width)
        out.copy_(lines.view(-1, width)[:, cols])


@contextmanager
def _prefix_errors(piece: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{piece}: {error}") from error
