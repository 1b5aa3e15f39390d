"""Functions that the kernels share: reading a tile, and products of operands that are split into bfloat16 parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from triton import knobs

from .columns import FIELDS, LAYOUT

# The interpreter computes bfloat16 dot products wrongly (triton#11584) and truncates float32 to bfloat16 where
# GPUs round to nearest; ``dot`` and ``narrow`` do there what the compiled code does.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


def inlined(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for functions that kernels call.

    The interpreter patches the whole language anew at every call of a jitted function; inside a kernel that has
    been done.
    """
    return function if INTERPRETED.value else triton.jit(function)


@inlined
def row_of(table, weight):
    """A weight's row of the table."""
    tl.static_assert(LAYOUT >= 0)
    return table + weight.to(tl.int64) * FIELDS


@inlined
def address(field, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer stored in a table field; ALIGNED promises 16 bytes, which is what makes 128-bit accesses possible."""
    pointer = tl.load(field).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@inlined
def extent(field, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An extent or a stride from a table field; ALIGNED promises whole 16-byte units of TYPE."""
    value = tl.load(field)
    if ALIGNED:
        value = tl.multiple_of(value, 128 // TYPE.primitive_bitwidth)
    return value


@inlined
def strides(field, TYPE: tl.constexpr, ROWS_CONTIGUOUS: tl.constexpr, ALIGNED: tl.constexpr):
    """The row stride in ``field`` and the column stride behind it; ALIGNED makes the contiguous one a constant 1."""
    if not ALIGNED:
        return tl.load(field), tl.load(field + 1)
    elif ROWS_CONTIGUOUS:
        return 1, extent(field + 1, TYPE, True)
    else:
        return extent(field, TYPE, True), 1


@inlined
def open_tile(
    pointer,
    rows,
    cols,
    row_stride,
    col_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The source that ``read_tile`` reads: a tensor descriptor over the matrix as it lies in memory, or the pointer."""
    if not DESCRIPTOR:
        return pointer
    elif ROWS_CONTIGUOUS:
        return tl.make_tensor_descriptor(
            pointer, [tl.cast(cols, tl.int32), tl.cast(rows, tl.int32)], [col_stride, 1], [BLOCK_COLS, BLOCK_ROWS]
        )
    else:
        return tl.make_tensor_descriptor(
            pointer, [tl.cast(rows, tl.int32), tl.cast(cols, tl.int32)], [row_stride, 1], [BLOCK_ROWS, BLOCK_COLS]
        )


@inlined
def read_tile(
    source,
    row,
    col,
    rows,
    cols,
    row_stride,
    col_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    ROWS_CONTIGUOUS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    EVEN: tl.constexpr,
):
    """The (BLOCK_ROWS, BLOCK_COLS) tile at (row, col), zero beyond the extents.

    EVEN promises that no tile reaches beyond them. ROWS_CONTIGUOUS says which dimension is contiguous in memory:
    pointers need not be told (their strides say it), a descriptor's tile is transposed on chip.
    """
    if not DESCRIPTOR:
        r = row + tl.arange(0, BLOCK_ROWS)
        c = col + tl.arange(0, BLOCK_COLS)
        pointers = source + (r[:, None] * row_stride + c[None, :] * col_stride)
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(r[:, None] < rows) & (c[None, :] < cols), other=0.0)
    elif ROWS_CONTIGUOUS:
        return tl.trans(source.load([tl.cast(col, tl.int32), tl.cast(row, tl.int32)]))
    else:
        return source.load([tl.cast(row, tl.int32), tl.cast(col, tl.int32)])


@inlined
def narrow(x, TYPE: tl.constexpr):
    """x in another type, rounded to the nearest (ties to even)."""
    if INTERPRETED and TYPE == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
        # Adding to a NaN's bits could make an infinity of it.
        return tl.where(x != x, tl.full(x.shape, 0x7FC0, tl.uint16), rounded).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(TYPE)


@inlined
def part(x, PART: tl.constexpr):
    """The PART-th bfloat16 part of x: x is close to part 0 + part 1 + ..., each 2^-9 of the one before."""
    if x.dtype == tl.bfloat16:
        tl.static_assert(PART == 0)
        return x
    else:
        rest = x.to(tl.float32)
        for _ in tl.static_range(PART):
            rest = rest - narrow(rest, tl.bfloat16).to(tl.float32)
        return narrow(rest, tl.bfloat16)


@inlined
def dot(a, b, acc):
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@inlined
def dot_parts(a, b, acc, A_PARTS: tl.constexpr, B_PARTS: tl.constexpr):
    """acc + a b with the operands in parts; products below the last part's weight are left out.

    The smallest products come first, so that they are not lost against the largest.
    """
    LAST: tl.constexpr = (A_PARTS if A_PARTS > B_PARTS else B_PARTS) - 1
    for back in tl.static_range(LAST + 1):
        for i in tl.static_range(A_PARTS):
            if LAST - back - i >= 0:
                if LAST - back - i < B_PARTS:
                    acc = dot(part(a, i), part(b, LAST - back - i), acc)
    return acc
