"""The layout of matrices in memory, as the kernels see them: shorter side first, by strides and alignment."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from .variants import WEIGHT_AND_BASE, Precision, TypeName

Strides = tuple[int, int]
_NONE: Strides = (0, 0)
# The dtypes that kernels read and write.
TYPE_NAMES: dict[torch.dtype, TypeName] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
# The pairs of W and W0 that kernels read.
READABLE = frozenset(
    (weight, base)
    for weight, base in product(TYPE_NAMES, repeat=2)
    if (TYPE_NAMES[weight], TYPE_NAMES[base]) in WEIGHT_AND_BASE
)


def type_name(dtype: torch.dtype) -> TypeName:
    """The name by which variants hold a dtype.

    Raises:
        ValueError: no kernel takes it.
    """
    name = TYPE_NAMES.get(dtype)
    if name is None:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, TYPE_NAMES))}; cast to one of them")
    return name


# Everything about a matrix but its address that decides how kernels read it: shape, strides, dtype, and its address
# modulo 16. Equal facts mean equal launches.
Facts = tuple[tuple[int, int], Strides, torch.dtype, int]


class MatrixLayout(NamedTuple):
    """A matrix seen shorter side first, or transposed.

    ``pointer``: 16-byte vectors may be read along its contiguous dimension. ``descriptor``: a tensor descriptor may
    describe it (whose extents need not be whole vectors).
    """

    strides: Strides
    rows_contiguous: bool
    pointer: bool
    descriptor: bool


def layout_of(matrix: Facts, transposed: bool) -> MatrixLayout:
    """The layout of a matrix; ``transposed`` where the kernels see its transpose."""
    shape, (down, across), dtype, misalignment = matrix
    contiguous = 1 if across == 1 else 0
    unit = 16 // dtype.itemsize
    other = down if contiguous else across
    described = (
        (across if contiguous else down) == 1
        and other >= shape[contiguous]
        and other % unit == 0
        and misalignment == 0
        and shape[0] * shape[1] > 0
    )
    whole_vectors = described and shape[contiguous] % unit == 0
    strides = (across, down) if transposed else (down, across)
    return MatrixLayout(strides, (contiguous == 0) != transposed, whole_vectors, described)


def to_aligned_float32(values: Tensor) -> Tensor:
    """Numbers (C or B) in float32, contiguous, and at a multiple of 16 bytes as fresh tensors are."""
    values = values.to(torch.float32).contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


class Problem(NamedTuple):
    """The static description of one weight, equal for equal layouts. An operand that is not read has strides (0, 0)."""

    rows: int
    cols: int
    rank: int
    weight: Strides = _NONE
    base: Strides = _NONE
    left: Strides = _NONE
    right: Strides = _NONE
    grad: Strides = _NONE


class ProjectKey(NamedTuple):
    """The properties that weights must share to be projected by the same launches."""

    precision: Precision
    rank_class: int
    transposed: bool
    rows_contiguous: bool
    aligned: bool


class PullKey(NamedTuple):
    """The properties that gradients must share to be computed by the same launches.

    ``rows_contiguous`` says how the gradients lie.
    """

    basis: TypeName
    grad: TypeName
    rank_class: int
    transposed: bool
    rows_contiguous: bool
    aligned: bool
    grad_aligned: bool


class FullKey(NamedTuple):
    """The properties that full anchors must share for one launch.

    ``flipped``: the matrices are seen transposed, so that rows are contiguous.
    """

    weight: TypeName
    base: TypeName
    grad: TypeName | None
    flipped: bool
    aligned: bool


def is_transposed(shape: tuple[int, int]) -> bool:
    """Whether the kernels see the transpose: the side contracted first is the longer one, which costs least."""
    return shape[0] > shape[1]


def round_up(value: int, unit: int) -> int:
    """The smallest multiple of ``unit`` that is not less than ``value``."""
    return -(-value // unit) * unit


def static_columns(problems: Sequence[Problem]) -> dict[str, list[int]]:
    """The columns of the table that the problems themselves decide: extents and strides."""
    columns = {
        "ROWS": [p.rows for p in problems],
        "COLS": [p.cols for p in problems],
        "RANK": [p.rank for p in problems],
    }
    for name in ("weight", "base", "left", "right", "grad"):
        pairs = [getattr(p, name) for p in problems]
        columns[f"{name.upper()}_ROW"] = [pair[0] for pair in pairs]
        columns[f"{name.upper()}_COL"] = [pair[1] for pair in pairs]
    return columns


def addresses_of(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
