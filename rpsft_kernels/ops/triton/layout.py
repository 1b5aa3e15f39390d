"""One weight as the kernels see it: shorter side first, pieces described by strides and alignment."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .variants import WEIGHT_AND_BASE, Form, TypeName

Strides = tuple[int, int]
_NONE: Strides = (0, 0)
# What the kernels read and write.
TYPE_NAMES: dict[torch.dtype, TypeName] = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def type_name(dtype: torch.dtype) -> TypeName:
    """The name by which variants hold a dtype.

    Raises:
        ValueError: no kernel takes it.
    """
    name = TYPE_NAMES.get(dtype)
    if name is None:
        raise ValueError(f"dtype: got {dtype}, expected one of {', '.join(map(str, TYPE_NAMES))}; cast to one of them")
    return name


class Lies(NamedTuple):
    """How a matrix lies in memory, seen shorter side first.

    ``pointer``: 16-byte vectors may be read along its contiguous dimension. ``descriptor``: a tensor descriptor may
    describe it (whose extents need not be whole vectors).
    """

    strides: Strides
    rows_contiguous: bool
    pointer: bool
    descriptor: bool


def lies(matrix: Tensor, transposed: bool) -> Lies:
    """How ``matrix`` lies; ``transposed`` where the kernels see its transpose."""
    down, across = matrix.stride()
    contiguous = 1 if across == 1 else 0
    other = matrix.stride(1 - contiguous)
    unit = 16 // matrix.element_size()
    described = (
        matrix.stride(contiguous) == 1
        and other >= matrix.shape[contiguous]
        and other % unit == 0
        and matrix.data_ptr() % 16 == 0
        and matrix.numel() > 0
    )
    vectors = described and matrix.shape[contiguous] % unit == 0
    strides = (across, down) if transposed else (down, across)
    return Lies(strides, (contiguous == 0) != transposed, vectors, described)


def readable(weight: Tensor, base: Tensor) -> Tensor:
    """W0 in a dtype that kernels for W come in: as it is, else as a weight of W's dtype holds it, which is what the
    kernels make of it in any case.
    """
    known = base.dtype in TYPE_NAMES and (type_name(weight.dtype), TYPE_NAMES[base.dtype]) in WEIGHT_AND_BASE
    return base if known else base.to(weight.dtype)


def vectors(values: Tensor) -> Tensor:
    """Numbers (C, B, scales) in float32, contiguous, and at a multiple of 16 bytes as fresh tensors are."""
    values = values.to(torch.float32).contiguous()
    return values if values.data_ptr() % 16 == 0 else values.clone()


class Problem(NamedTuple):
    """The static description of one weight, equal for equal layouts. Pieces that a phase lacks have strides (0, 0)."""

    rows: int
    cols: int
    rank: int
    weight: Strides = _NONE
    base: Strides = _NONE
    left: Strides = _NONE
    right: Strides = _NONE
    grad: Strides = _NONE


class Group(NamedTuple):
    """What weights must share to be projected by the same launches."""

    form: Form
    rank_class: int
    transposed: bool
    rows_contiguous: bool
    aligned: bool


class PullGroup(NamedTuple):
    """What gradients must share to be computed by the same launches; ``rows_contiguous`` says how the gradients lie."""

    basis: TypeName
    grad: TypeName
    rank_class: int
    transposed: bool
    rows_contiguous: bool
    aligned: bool
    grad_aligned: bool


def is_transposed(shape: torch.Size) -> bool:
    """Whether the kernels see the transpose: the side contracted first is the longer one, which costs least."""
    return shape[0] > shape[1]
