"""Pieces of anchors with checksums: a CRC-32 for each block of rows, so that a rank checks what it reads alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

# Small beside a piece, and still in the cache when its checksum is computed.
_BLOCK_BYTES = 1 << 20


def blank_checksums(shape: tuple[int, ...], itemsize: int) -> dict[str, Any]:
    """Return checksums of a piece as its record holds them, with zeros in place of the sums.

    ``rows`` is the number of rows in a block (of elements, where a piece is flat), ``crc32`` has the sum of each
    block's bytes in eight hexadecimal digits.
    """
    row_bytes = itemsize * (shape[1] if len(shape) == 2 else 1)
    rows = max(1, _BLOCK_BYTES // max(1, row_bytes))
    return {"rows": rows, "crc32": ["0" * 8] * (-(-shape[0] // rows) if row_bytes else 0)}


def write_piece(file: BinaryIO, piece: Tensor) -> dict[str, Any]:
    """Write the bytes of a contiguous ``piece`` on the CPU to ``file``, and return its checksums."""
    checksums = blank_checksums(tuple(piece.shape), piece.element_size())
    for i in range(len(checksums["crc32"])):
        content = _view_bytes(piece[i * checksums["rows"] : (i + 1) * checksums["rows"]])
        checksums["crc32"][i] = checksum_bytes(content)
        file.write(content)
    return checksums


def checksum_bytes(content: bytes | memoryview) -> str:
    return f"{zlib.crc32(content):08x}"


class StoredPiece:
    """One piece in a file; what is read of it is checked, where the file has checksums.

    Args:
        source: safetensors' lazy tensor.
        checksums: as :func:`write_piece` returned them; None for files of versions that wrote none.

    Raises:
        ValueError: ``checksums`` are not such, or later: a block has another checksum.
    """

    def __init__(self, source: Any, checksums: Any) -> None:
        self._source = source
        self.shape = tuple(source.get_shape())
        self._rows, self._sums = max(1, self.shape[0] if self.shape else 1), None
        if checksums is not None:
            self._rows, self._sums = _parse(checksums, self.shape)

    def blocks(self, begin: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the rows ``begin`` to ``end``, block by block, each with the index of its first row."""
        if self._sums is None:
            yield begin, self._read(begin, end)
            return
        for i in range(begin // self._rows, -(-end // self._rows)):
            first = i * self._rows
            block = self._read(first, min(first + self._rows, self.shape[0]))
            found = checksum_bytes(_view_bytes(block))
            if self._sums and found != self._sums[i]:
                raise ValueError(
                    f"got rows {first}:{first + block.shape[0]} with checksum {found}, expected {self._sums[i]}: the "
                    "file is damaged; copy it again from where it is whole, or anchor the pretrained model again"
                )
            yield max(begin, first), block[max(begin - first, 0) : end - first]

    def read(self, begin: int, end: int) -> Tensor:
        """Return the rows ``begin`` to ``end`` in one tensor."""
        blocks = [block for _, block in self.blocks(begin, end)]
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks) if blocks else self._read(begin, end)

    def allocate(self, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor without values of the piece's dtype."""
        return self._read(0, 0).new_empty(shape)

    def _read(self, begin: int, end: int) -> Tensor:
        try:
            rows: Tensor = self._source[begin:end]
        except SafetensorError as error:
            raise ValueError(f"got a tensor that cannot be read ({error}), expected one from Anchors.save") from error
        return rows


def _view_bytes(piece: Tensor) -> memoryview:
    content: memoryview = piece.detach().reshape(-1).view(torch.uint8).numpy().data
    return content


def _parse(checksums: Any, shape: tuple[int, ...]) -> tuple[int, list[str]]:
    rows, sums = (checksums.get(key) if isinstance(checksums, Mapping) else None for key in ("rows", "crc32"))
    if type(rows) is not int or rows < 1 or not isinstance(sums, list):
        raise ValueError(f"got checksums {checksums!r}, expected rows of a block and a list of crc32")
    expected = -(-shape[0] // rows) if shape and all(shape) else 0
    if len(sums) != expected:
        raise ValueError(f"got {len(sums)} checksums, expected {expected} for shape {shape} in blocks of {rows} rows")
    return rows, sums
