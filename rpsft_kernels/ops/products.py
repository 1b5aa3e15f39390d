"""Matrix products of the ``torch`` backend: how a device multiplies, and how much of a weight it reads at once.

GPUs multiply bfloat16 many times faster than float32. So where a GPU can, operands are bfloat16 numbers, or as many as
make up a wider one (three hold all of a float32), and products are summed in float32. That also keeps torch's switches
out of the results: TF32 rounds only operands wider than bfloat16, and there are none.
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
# Tiles of GPU libraries divide blocks of so many rows.
_ROW_MULTIPLE = 128
Operand = tuple[Tensor, ...]
# "float32": float32 products. "bfloat16": products of bfloat16, rounded to it. "mixed": of bfloat16, into float32 too.
Units = Literal["float32", "bfloat16", "mixed"]


@lru_cache(maxsize=64)
def has_float64(device: torch.device) -> bool:
    """Return whether a device computes in float64; Apple's GPUs and some of Intel's do not."""
    if device.type == "xpu":
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"


@dataclass(frozen=True)
class Machine:
    """The products that are fast on a device, and the bytes of temporaries that a block of a weight may need there
    (None: as many as a CPU's cache holds).
    """

    units: Units
    block_bytes: int | None

    def row_blocks(self, shape: Sequence[int], row_bytes: int, fixed_bytes: int = 0) -> Iterator[slice]:
        """Divide a matrix into blocks of rows.

        Args:
            shape: (rows, columns).
            row_bytes: bytes of temporaries for each row of a block.
            fixed_bytes: bytes of temporaries beside a block, whatever its rows.
        """
        rows, cols = shape
        if self.block_bytes is None:
            # At least four blocks even for a small weight, so that "no m x n temporary" holds at every size.
            step = max(16, min(_CPU_BLOCK_ELEMENTS // max(cols, 1), -(-rows // 4)))
        else:
            room = max(self.block_bytes - fixed_bytes, self.block_bytes // 4)
            most = max(16, room // max(row_bytes, 1))
            # Blocks are equal, and of whole tiles where the limit allows it.
            step = -(-rows // max(1, -(-rows // most)))
            even = -(-step // _ROW_MULTIPLE) * _ROW_MULTIPLE
            step = max(1, even if even <= most else step)
        for start in range(0, rows, step):
            yield slice(start, min(start + step, rows))


@lru_cache(maxsize=64)
def machine(device: torch.device) -> Machine:
    """Return what a device multiplies fast, and the bytes that its blocks may need."""
    if device.type == "cpu":
        return Machine("float32", None)
    if device.type != "cuda" or (torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)):
        return Machine("float32", _BLOCK_BYTES)
    return Machine("mixed" if _multiplies_into_float32(device) else "bfloat16", _BLOCK_BYTES)


def _multiplies_into_float32(device: torch.device) -> bool:
    # torch has such products for CUDA since 2.8, for ROCm since some later version.
    if not hasattr(torch.ops.aten.mm, "dtype"):
        return False
    ones = torch.ones((16, 16), dtype=torch.bfloat16, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32)
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

    def multiply(self, first: Operand, second: Operand, coarse: bool = False) -> Tensor:
        return first[0] @ second[0]

    def add(self, total: Tensor | None, first: Operand, second: Operand, coarse: bool = False) -> Tensor:
        """Return ``total + first @ second``, in the memory of ``total`` where there is one."""
        return first[0] @ second[0] if total is None else total.addmm_(first[0], second[0])

    def operand_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that an element of a matrix of ``dtype`` needs to become an operand."""
        return 0 if dtype == self.dtype else self.dtype.itemsize


class Parts:
    """Products of bfloat16 numbers, summed in float32.

    With ``rounds`` an operand is its matrix rounded to bfloat16. Else it is as many parts as make up the matrix, and
    products of parts that a float32 sum would not show are left out.
    """

    dtype = torch.float32

    def __init__(self, units: Units, rounds: bool) -> None:
        self.units, self.rounds = units, rounds
        # Parts that cannot be multiplied into float32 as bfloat16 are held as float32. TF32 keeps all of their bits.
        self._part_dtype = torch.bfloat16 if rounds or units == "mixed" else torch.float32

    def operand(self, matrix: Tensor) -> Operand:
        count = 1 if self.rounds else _PARTS.get(matrix.dtype, 3)
        parts = [matrix.to(torch.bfloat16)]
        rest = matrix
        while len(parts) < count:
            rest = rest.to(torch.float32) - parts[-1]
            parts.append(rest.to(torch.bfloat16))
        return tuple(part.to(self._part_dtype) for part in parts)

    def multiply(self, first: Operand, second: Operand, coarse: bool = False) -> Tensor:
        """Multiply. A ``coarse`` product is to be an operand: where operands are rounded, it may be rounded already."""
        if coarse and self.rounds:
            # torch may add up rounded sums here by default (allow_bf16_reduced_precision_reduction). That is off by
            # about as much as rounding the whole sum is.
            return first[0] @ second[0]
        last = max(len(first), len(second)) - 1
        pairs = [(i, j) for i in range(len(first)) for j in range(len(second)) if i + j <= last]
        # The smallest products are added first.
        pairs.sort(key=lambda pair: -sum(pair))
        total = self._multiply_parts(first[pairs[0][0]], second[pairs[0][1]])
        for i, j in pairs[1:]:
            total += self._multiply_parts(first[i], second[j])
        return total

    def add(self, total: Tensor | None, first: Operand, second: Operand, coarse: bool = False) -> Tensor:
        """Return ``total + first @ second``, in the memory of ``total`` where there is one; ``coarse`` as in
        :meth:`multiply`.
        """
        product = self.multiply(first, second, coarse)
        return product if total is None else total.add_(product)

    def _multiply_parts(self, first: Tensor, second: Tensor) -> Tensor:
        if self.units == "mixed" and first.numel() and second.numel():
            return torch.mm(first, second, out_dtype=torch.float32)
        return first.float() @ second.float()

    def operand_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes that an element of a matrix of ``dtype`` needs to become an operand."""
        if dtype == torch.bfloat16:
            return 0 if self._part_dtype == dtype else self._part_dtype.itemsize
        # Two rests at a time lie beside the parts.
        return 2 if self.rounds else 2 * _PARTS.get(dtype, 3) + 8 + (0 if self.units == "mixed" else 12)


# Parts that hold every number of a dtype; float32 needs three.
_PARTS = {torch.bfloat16: 1, torch.float16: 2}
Multiplier = Plain | Parts


def choose_multiplier(machine: Machine, dtype: torch.dtype, rounds: bool) -> Multiplier:
    """Return the way a machine multiplies for sums in ``dtype``; ``rounds``: operands may be rounded to bfloat16."""
    if machine.units == "float32" or dtype == torch.float64:
        return Plain(dtype)
    return Parts(machine.units, rounds)


def transpose(operand: Operand) -> Operand:
    return tuple(part.T for part in operand)


def rows_of(operand: Operand, block: slice) -> Operand:
    # Making a view of all rows would only take the host's time.
    return tuple(part if block.stop - block.start == part.shape[0] else part[block] for part in operand)
