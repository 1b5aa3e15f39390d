"""The table of fields that grouped kernels read: rows on the host and on the device, sent where they differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import fields
from .upload import ALIGNMENT, copy_rows, register_table

_ROW_BYTES = 8 * fields.WIDTH
# A gradient's row holds its scale as a float32 number in the column of the splits, which only drifts have.
SCALE = "SPLITS"


class Table:
    """Rows for the launches of one stream.

    :meth:`send` brings them to the device: one copy for all rows between the first and the last that changed, in the
    stream's order.
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self.host = np.zeros((rows, fields.WIDTH), np.int64)
        # Later calls may be outside of inference mode.
        with torch.inference_mode(False):
            self.memory = torch.empty(rows * fields.WIDTH, dtype=torch.int64, device=device)
        self._used = self._last = self._takes = 0
        self._first = rows
        register_table(self)

    @property
    def nbytes(self) -> int:
        """Bytes of the rows in use, if the rows of each operation were sent separately."""
        return self._used * _ROW_BYTES + self._takes * ALIGNMENT

    def has_room(self, count: int) -> bool:
        return self._used + count <= len(self.host)

    def take(self, count: int) -> Rows:
        first = self._used
        self._used += count
        self._takes += 1
        return Rows(self, first, count)

    def mark(self, first: int, count: int) -> None:
        self._first, self._last = min(self._first, first), max(self._last, first + count)

    def send(self) -> None:
        first, last = self._first, self._last
        if first < last:
            copy_rows(self.host[first:last], self.memory[first * fields.WIDTH : last * fields.WIDTH])
            self._first, self._last = len(self.host), 0


@dataclass(frozen=True)
class Rows:
    """``count`` rows of a table from ``first`` on."""

    table: Table
    first: int
    count: int

    def write(self, column: str, values: Sequence[int]) -> None:
        self.table.host[self.first : self.first + self.count, fields.INDEX[column]] = values
        self.table.mark(self.first, self.count)

    def slice(self, begin: int, count: int) -> Rows:
        return Rows(self.table, self.first + begin, count)

    def memory(self) -> Tensor:
        """The rows on the device, flattened."""
        return self.table.memory[self.first * fields.WIDTH : (self.first + self.count) * fields.WIDTH]


def float_bits(values: Sequence[float]) -> list[int]:
    """Numbers in float32 as a column holds them."""
    # Numbers that are too large become infinite, as everywhere.
    with np.errstate(over="ignore"):
        bits: list[int] = np.array(values, np.float32).view(np.uint32).tolist()
    return bits


def place_scales(rows: Rows, order: Sequence[int], scales: Tensor | None) -> Tensor:
    """Write where each row's scale stands; returns the memory that it stands in.

    Args:
        order: the weights of the rows, by their places in their batch.
        scales: float32 numbers on the device by these places; None: they stand in the rows themselves.
    """
    if scales is not None:
        rows.write("NUMBER", order)
        return scales
    # The lower half of an int64, counted in float32 from the beginning of the table.
    at = fields.INDEX[SCALE]
    rows.write("NUMBER", [2 * ((rows.first + i) * fields.WIDTH + at) for i in range(rows.count)])
    return rows.table.memory.view(torch.float32)
