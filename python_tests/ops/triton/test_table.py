"""The table of fields: what is written reaches the device in one copy, and only where something was written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rpsft_kernels.ops.triton import table as tables
from rpsft_kernels.ops.triton import upload
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH
from rpsft_kernels.ops.triton.table import SCALE, Rows, Table, float_bits, place_scales

CPU = torch.device("cpu")


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of all copies."""
    found: list[int] = []

    def copy_rows(source: np.ndarray, target: torch.Tensor) -> None:
        found.append(len(source))
        upload.copy_rows(source, target)

    monkeypatch.setattr(tables, "copy_rows", copy_rows)
    return found


def column(rows: Rows, name: str) -> list[int]:
    """A column as the device holds it."""
    found: list[int] = rows.memory().view(-1, WIDTH)[:, INDEX[name]].tolist()
    return found


def test_rows_lie_behind_each_other(copied: list[int]) -> None:
    table = Table(CPU, 5)
    first, second = table.take(2), table.take(3)
    assert not table.has_room(1)
    first.write("ROWS", [1, 2])
    second.write("ROWS", [3, 4, 5])
    table.send()
    assert copied == [5], "one copy for all that was written"
    assert column(first, "ROWS") == [1, 2] and column(second, "ROWS") == [3, 4, 5]
    assert column(second.slice(1, 2), "ROWS") == [4, 5]
    assert first.memory().data_ptr() == table.memory.data_ptr()
    assert second.memory().data_ptr() == table.memory.data_ptr() + 2 * WIDTH * 8


def test_rows_begin_where_kernels_expect_them() -> None:
    """Kernels compiled ahead of time are not launched on a table that does not begin at a multiple of 16 bytes."""
    table = Table(CPU, 9)
    parts = [table.take(count) for count in (1, 2, 3)]
    assert [rows.first for rows in parts] == [0, 1, 3]
    assert [rows.memory().data_ptr() % 16 for rows in (*parts, parts[2].slice(1, 2))] == [0, 0, 0, 0]


def test_only_rows_that_were_written_are_sent(copied: list[int]) -> None:
    table = Table(CPU, 6)
    parts = [table.take(2) for _ in range(3)]
    for part in parts:
        part.write("COLS", [7, 8])
    table.send()
    table.send()
    assert copied == [6]
    parts[1].write("GRAD", [10, 11])
    table.send()
    parts[0].write("GRAD", [12, 13])
    parts[1].write("GRAD", [14, 15])
    table.send()
    assert copied == [6, 2, 4]
    assert [column(part, "GRAD") for part in parts] == [[12, 13], [14, 15], [0, 0]]
    assert all(column(part, "COLS") == [7, 8] for part in parts)


def test_what_is_written_is_not_on_the_device_before_it_is_sent() -> None:
    table = Table(CPU, 1)
    rows = table.take(1)
    rows.write("RANK", [3])
    table.send()
    rows.write("RANK", [4])
    assert column(rows, "RANK") == [3]


def test_a_captured_step_has_room_for_each_operation_by_itself() -> None:
    table = Table(CPU, 100)
    for count in (1, 10):
        table.take(count)
    alone = [-(-count * WIDTH * 8 // upload.ALIGNMENT) * upload.ALIGNMENT for count in (1, 10)]
    assert sum(alone) <= table.nbytes <= 100 * WIDTH * 8
    assert table in upload._tables, "it is counted where memory is set aside"


def test_scales_are_float32_numbers_of_the_rows() -> None:
    table = Table(CPU, 4)
    table.take(1)
    rows = table.take(3)
    scales = [0.5, -2.0, 1 / 3]
    rows.write(SCALE, float_bits(scales))
    numbers = place_scales(rows, [0, 1, 2], None)
    table.send()
    # A kernel reads them like this: by the row's number, from the argument ``scales``.
    assert numbers[column(rows, "NUMBER")].tolist() == torch.tensor(scales).tolist()
    assert numbers.data_ptr() % 16 == 0


def test_scales_on_the_device_are_found_by_the_weights_places() -> None:
    table = Table(CPU, 3)
    rows = table.take(3)
    scales = torch.tensor([10.0, 11.0, 12.0])
    numbers = place_scales(rows, [2, 0, 1], scales)
    table.send()
    assert numbers is scales
    assert numbers[column(rows, "NUMBER")].tolist() == [12.0, 10.0, 11.0]
