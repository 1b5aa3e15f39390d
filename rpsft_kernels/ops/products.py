"""How the ``torch`` backend multiplies matrices on a device, and how much of a weight it reads at once there.

GPUs multiply bfloat16 many times faster than float32. So where a GPU can, operands are bfloat16 numbers, or as many as
make up a wider one (three hold all of a float32), and products are summed in float32. That also keeps torch's switches
out of the results: TF32 rounds what is wider than bfloat16, and there is no such operand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

# Elements of one block of rows: 512 KiB in float32 stays in a core's second-level cache.
_CPU_BLOCK_ELEMENTS = 1 << 17
_BLOCK_BYTES = 256 << 20
# Of a GPU: what its tiles divide.
_ROW_MULTIPLE = 128
Operand = tuple[Tensor, ...]
# "float32": float32 products. "bfloat16": of bfloat16, rounded to it. "mixed": of bfloat16, into float32 too.
Units = Literal["float32", "bfloat16", "mixed"]


@dataclass(frozen=True)
class Machine:
    """What a device multiplies fast, and how many bytes of temporaries a block of a weight may need there (None: as
    many as a CPU's cache holds)."""

    units: Units
    block_bytes: int | None

    def row_blocks(self, shape: Sequence[int], row_bytes: int, beside: int = 0) -> Iterator[slice]:
        """Blocks of rows. ``row_bytes``: temporaries of one row; ``beside``: what there is but once."""
        rows, cols = shape
        if self.block_bytes is None:
            # At least four blocks even for a small weight, so that "no m x n temporary" holds at every size.
            step = max(16, min(_CPU_BLOCK_ELEMENTS // max(cols, 1), -(-rows // 4)))
        else:
            room = max(self.block_bytes - beside, self.block_bytes // 4)
            most = max(16, room // max(row_bytes, 1))
            # Equal blocks, of whole tiles where that is not too much.
            step = -(-rows // max(1, -(-rows // most)))
            even = -(-step // _ROW_MULTIPLE) * _ROW_MULTIPLE
            step = max(1, even if even <= most else step)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


@lru_cache(maxsize=64)
def machine(device: torch.device) -> Machine:
    """What a device is good at."""
    if device.type == "cpu":
        return Machine("float32", None)
    if device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)):
        return Machine("float32", _BLOCK_BYTES)
    return Machine("mixed" if _multiplies_into_float32(device) else "bfloat16", _BLOCK_BYTES)


def _multiplies_into_float32(device: torch.device) -> bool:
    # torch 2.8 for CUDA, some later one for ROCm.
    if not hasattr(torch.ops.aten.mm, "dtype"):
        return False
    one = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.mm(one, one, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


class Plain:
    """Products in the dtype of their sums, float32 or float64."""

    rounds = False

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def operand(self, matrix: Tensor) -> Operand:
        return (matrix.to(self.dtype),)

    def multiply(self, one: Operand, other: Operand, coarse: bool = False) -> Tensor:
        return one[0] @ other[0]

    def add(self, total: Tensor | None, one: Operand, other: Operand, coarse: bool = False) -> Tensor:
        """``total + one @ other``, in ``total`` where there is one."""
        return one[0] @ other[0] if total is None else total.addmm_(one[0], other[0])

    def operand_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that an element of a matrix of ``dtype`` needs to become an operand."""
        return 0 if dtype == self.dtype else self.dtype.itemsize


class Parts:
    """Products of bfloat16 numbers, summed in float32.

    ``rounds``: an operand is its matrix rounded to bfloat16; else it is as many parts as make up the matrix, and
    products of parts are left out that a float32 sum would not show.
    """

    dtype = torch.float32

    def __init__(self, units: Units, rounds: bool) -> None:
        self.units, self.rounds = units, rounds
        # What cannot be multiplied into float32 as bfloat16 is held as float32. TF32 keeps all of such numbers.
        self._held = torch.bfloat16 if rounds or units == "mixed" else torch.float32

    def operand(self, matrix: Tensor) -> Operand:
        count = 1 if self.rounds else _PARTS.get(matrix.dtype, 3)
        parts = [matrix.to(torch.bfloat16)]
        rest = matrix
        while len(parts) < count:
            rest = rest.to(torch.float32) - parts[-1]
            parts.append(rest.to(torch.bfloat16))
        return tuple(part.to(self._held) for part in parts)

    def multiply(self, one: Operand, other: Operand, coarse: bool = False) -> Tensor:
        """The product. ``coarse``: it is to be an operand; so where operands are rounded, it is rounded already."""
        if coarse and self.rounds:
            # Perhaps a sum of rounded sums, which torch allows by default (allow_bf16_reduced_precision_reduction): off
            # by about as much as rounding the whole sum is.
            return one[0] @ other[0]
        last = max(len(one), len(other)) - 1
        pairs = [(i, j) for i in range(len(one)) for j in range(len(other)) if i + j <= last]
        # The smallest first.
        pairs.sort(key=lambda pair: -sum(pair))
        total = self._float32(one[pairs[0][0]], other[pairs[0][1]])
        for i, j in pairs[1:]:
            total += self._float32(one[i], other[j])
        return total

    def add(self, total: Tensor | None, one: Operand, other: Operand, coarse: bool = False) -> Tensor:
        """``total + one @ other``, in ``total`` where there is one. ``coarse``: as in :meth:`multiply`."""
        product = self.multiply(one, other, coarse)
        return product if total is None else total.add_(product)

    def _float32(self, one: Tensor, other: Tensor) -> Tensor:
        if self.units == "mixed" and one.numel() and other.numel():
            return torch.mm(one, other, out_dtype=torch.float32)
        return one.float() @ other.float()

    def operand_bytes(self, dtype: torch.dtype) -> int:
        """Bytes that an element of a matrix of ``dtype`` needs to become an operand."""
        if dtype == torch.bfloat16:
            return 0 if self._held == dtype else self._held.itemsize
        # Beside the parts there are two rests at a time.
        return 2 if self.rounds else 2 * _PARTS.get(dtype, 3) + 8 + (0 if self.units == "mixed" else 12)


# How many parts hold every number of a dtype; three of float32.
_PARTS = {torch.bfloat16: 1, torch.float16: 2}
Products = Plain | Parts


def products(machine: Machine, dtype: torch.dtype, rounds: bool) -> Products:
    """How a machine multiplies for sums in ``dtype``; ``rounds``: operands may be rounded to bfloat16."""
    if machine.units == "float32" or dtype == torch.float64:
        return Plain(dtype)
    return Parts(machine.units, rounds)


def transposed(operand: Operand) -> Operand:
    return tuple(part.T for part in operand)


def rows_of(operand: Operand, block: slice) -> Operand:
    # A view of everything would only take the host's time.
    return tuple(part if block.stop - block.start == part.shape[0] else part[block] for part in operand)
