"""The ``torch`` backend: both operations in plain PyTorch, for any floating dtype up to float64 and any device.

On the CPU, and on GPUs that multiply bfloat16 no faster, arithmetic is float32; it is float64 for float64 weights, and
for the small second product where there is no base. Other GPUs multiply bfloat16 into float32 sums
(:mod:`rpsft_kernels.ops.products`). With U and V in bfloat16 all numbers as small as the drift are rounded to bfloat16,
as the Triton kernels do: W - W0 (subtracted in float32), T, C and P. Everything else is as exact as float32.

Weights are read in blocks of rows. No temporary is as large as a weight on the CPU. On a GPU all temporaries of a block
take at most 256 MiB, those beside a block (U and V in other dtypes, intermediates of (k, min(m, n))) included as long
as three quarters of that hold them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import products
from .operands import Operands
from .products import Multiplier, Operand, Parts, Plain, rows_of, transpose


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return "it computes in bfloat16, float16, float32 and float64 only"
    return None


def cannot_write(dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return "it writes bfloat16, float16, float32 and float64 only"
    return None


def arithmetic(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    # CUDA's library chooses its products by the GPU's generation.
    generation = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{device.type}-{generation}-{products.machine(device).units}"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of every sum over weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cast_as_trained(base: Tensor, weight: Tensor) -> Tensor:
    """Cast the base as a model of the weight's dtype holds it: a float32 checkpoint in bfloat16 has no drift yet."""
    return base.to(weight.dtype)


def _subtract_rows(weight: Tensor, base: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    """Return rows of W - W0, or of W, in ``dtype``."""
    # A fresh, aligned buffer (copy=True) makes the bits of a product independent of where the weight lies.
    difference = weight[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
    if base is not None:
        difference -= _cast_as_trained(base[rows], weight).to(dtype)
    return difference


def _subtract_bytes(weight: Tensor, base: Tensor | None, dtype: torch.dtype) -> int:
    """Return the bytes of temporaries of :func:`_subtract_rows` for one element."""
    return dtype.itemsize + (0 if base is None else dtype.itemsize + weight.dtype.itemsize)


def _subtract_rows_rounded(weight: Tensor, base: Tensor, rows: slice) -> Tensor:
    """Return rows of W - W0, subtracted in float32 and rounded once to bfloat16."""
    weight_rows, base_rows = weight[rows], base[rows]
    if not _can_subtract_directly(weight, base):
        base_rows = _cast_as_trained(base_rows, weight)
    if weight.dtype == torch.float16:
        # The difference would be rounded to float16 in between.
        weight_rows = weight_rows.float()
    # One pass subtracts and rounds: the difference of bfloat16 numbers is rounded once in any case, and a float32
    # operand makes it float32.
    difference = torch.empty(weight_rows.shape, dtype=torch.bfloat16, device=weight.device)
    return torch.sub(weight_rows, base_rows, out=difference)


def _can_subtract_directly(weight: Tensor, base: Tensor) -> bool:
    """Return whether a subtraction reads the base's numbers as a model of the weight's dtype holds them."""
    return base.dtype == weight.dtype or (weight.dtype == torch.float32 and base.dtype.itemsize == 2)


def _subtract_bytes_rounded(weight: Tensor, base: Tensor) -> int:
    """Return the bytes of temporaries of :func:`_subtract_rows_rounded` for one element."""
    cast_bytes = 0 if _can_subtract_directly(weight, base) else weight.dtype.itemsize
    return 2 + cast_bytes + (4 if weight.dtype == torch.float16 else 0)


class _Difference:
    """W - W0 (or W), block by block, as the operand of a product."""

    def __init__(self, weight: Tensor, base: Tensor | None, multiplier: Multiplier) -> None:
        self.weight, self.base, self.multiplier = weight, base, multiplier

    def rows(self, block: slice) -> Operand:
        if self.base is not None and self.multiplier.rounds:
            return (_subtract_rows_rounded(self.weight, self.base, block),)
        if self.base is None and isinstance(self.multiplier, Parts):
            # A fresh buffer, for the reason given in _subtract_rows.
            return self.multiplier.operand(self.weight[block].clone(memory_format=torch.contiguous_format))
        return self.multiplier.operand(_subtract_rows(self.weight, self.base, block, self.multiplier.dtype))

    @property
    def bytes(self) -> int:
        """Bytes of temporaries of :meth:`rows` for one element."""
        multiplier = self.multiplier
        if self.base is not None and multiplier.rounds:
            return _subtract_bytes_rounded(self.weight, self.base)
        if self.base is None and isinstance(multiplier, Parts):
            return self.weight.dtype.itemsize + multiplier.operand_bytes(self.weight.dtype)
        read = _subtract_bytes(self.weight, self.base, multiplier.dtype)
        return read + multiplier.operand_bytes(multiplier.dtype)


def _are_bfloat16(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype == torch.bfloat16


def _project(weight: Tensor, left: Tensor, right: Tensor, base: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    machine = products.machine(weight.device)
    first = products.choose_multiplier(machine, dtype, rounds=base is not None and _are_bfloat16(left, right))
    # Without the base, the second product sums numbers as large as the weight: float32 sums would lose the drift.
    # (Apple's GPUs have no float64.)
    second = Plain(torch.float64) if base is None and products.has_float64(weight.device) else first
    difference = _Difference(weight, base, first)
    (rows, cols), rank = weight.shape, left.shape[1]
    # Bytes of an intermediate's element: its sum, the sum of one more product, and the operand made of it.
    intermediate_bytes = 2 * first.dtype.itemsize + second.operand_bytes(first.dtype)
    if rows <= cols:
        outer, inner = second.operand(left), first.operand(right)
        drift: Tensor | None = None
        row_bytes = cols * difference.bytes + rank * intermediate_bytes
        for block in machine.row_blocks(weight.shape, row_bytes, _fixed_bytes(left, right, outer, inner)):
            middle = second.operand(first.multiply(difference.rows(block), inner, coarse=True))
            drift = second.add(drift, transpose(rows_of(outer, block)), middle)
        return weight.new_zeros((rank, rank), dtype=dtype) if drift is None else drift.to(dtype)
    inner, outer = first.operand(left), second.operand(right)
    fixed_bytes = _fixed_bytes(left, right, outer, inner) + rank * cols * intermediate_bytes
    blocks = list(machine.row_blocks(weight.shape, cols * difference.bytes, fixed_bytes))
    # The product of a single block is the sum, and may be rounded already; several are added up in float32.
    total = None if len(blocks) == 1 else weight.new_zeros((rank, cols), dtype=first.dtype)
    for block in blocks:
        total = first.add(total, transpose(rows_of(inner, block)), difference.rows(block), coarse=True)
    assert total is not None
    return second.multiply(second.operand(total), outer).to(dtype)


def _fixed_bytes(left: Tensor, right: Tensor, *operands: Operand) -> int:
    """Return the bytes that the operands of products hold beside U and V themselves."""
    parts = {id(part): part for operand in operands for part in operand if part is not left and part is not right}
    return sum(part.numel() * part.element_size() for part in parts.values())


def project_drift(operands: Operands) -> tuple[list[Tensor], Tensor]:
    drifts: list[Tensor] = []
    squares: list[Tensor] = []
    weights, lefts, rights, pretrained, blocks = operands
    dtype = accumulation_dtype(weights[0].dtype)
    machine = products.machine(weights[0].device)
    for i, weight in enumerate(weights):
        base = pretrained[i] if pretrained else None
        if lefts:
            drift = _project(weight, lefts[i], rights[i], base)
            if blocks:
                drift -= blocks[i]
            squares.append(drift.square().sum())
        else:
            drift = weight.new_empty((0, 0), dtype=dtype)
            total = weight.new_zeros((), dtype=dtype)
            row_bytes = weight.shape[1] * max(_subtract_bytes(weight, base, dtype), 2 * dtype.itemsize)
            for block in machine.row_blocks(weight.shape, row_bytes):
                total += _subtract_rows(weight, base, block, dtype).square().sum()
            squares.append(total)
        drifts.append(drift)
    return drifts, torch.stack(squares)


def pull_back_into(
    grads: Sequence[Tensor], operands: Operands, drifts: Sequence[Tensor], scales: Tensor, accumulate: bool
) -> None:
    # The scales may lie on the CPU: an operator of a GPU takes a 0-dim tensor from there like a number.
    for i, grad in enumerate(grads):
        if not operands.full:
            _pull(grad, operands.lefts[i], operands.rights[i], drifts[i], scales[i], accumulate)
            continue
        weight, base = operands.weights[i], operands.pretrained[i]
        dtype = accumulation_dtype(weight.dtype)
        row_bytes = grad.shape[1] * _subtract_bytes(weight, base, dtype)
        for block in products.machine(grad.device).row_blocks(grad.shape, row_bytes):
            rows = _subtract_rows(weight, base, block, dtype).mul_(scales[i])
            _store(grad[block], rows, accumulate)


def _pull(grad: Tensor, left: Tensor, right: Tensor, drift: Tensor, scale: Tensor, accumulate: bool) -> None:
    machine = products.machine(grad.device)
    multiplier = products.choose_multiplier(machine, accumulation_dtype(drift.dtype), _are_bfloat16(left, right))
    first, second = multiplier.operand(left), multiplier.operand(right)
    # The k x k block goes to the side where it is cheaper.
    if grad.shape[0] <= grad.shape[1]:
        first = _multiply_drift(multiplier, first, drift, scale)
    else:
        second = _multiply_drift(multiplier, second, drift.T, scale)
    second = transpose(second)
    # A product adds itself to gradients of its own dtype. (torch may by default round partial sums of bfloat16
    # products: these are about as far off as P is, which was rounded too.)
    if grad.dtype == _product_dtype(multiplier):
        row_bytes = 0 if 1 in grad.stride() else grad.shape[1] * grad.element_size()
        for block in machine.row_blocks(grad.shape, row_bytes):
            grad[block].addmm_(first[0][block], second[0], beta=int(accumulate))
    else:
        fixed_bytes = _fixed_bytes(left, right, first, second)
        for block in machine.row_blocks(grad.shape, 2 * multiplier.dtype.itemsize * grad.shape[1], fixed_bytes):
            _store(grad[block], multiplier.multiply(rows_of(first, block), second), accumulate)


def _product_dtype(multiplier: Multiplier) -> torch.dtype | None:
    """Return the dtype of one product of operands; None where several products make up a sum."""
    if multiplier.rounds:
        return torch.bfloat16
    return multiplier.dtype if isinstance(multiplier, Plain) else None


def _multiply_drift(multiplier: Multiplier, basis: Operand, drift: Tensor, scale: Tensor) -> Operand:
    """Return ``P = scale * U C`` as an operand."""
    if multiplier.rounds:
        # One pass multiplies in float32 and rounds once.
        scaled = torch.mul(drift, scale, out=torch.empty(drift.shape, dtype=torch.bfloat16, device=drift.device))
        return multiplier.operand(multiplier.multiply(basis, (scaled,), coarse=True))
    return multiplier.operand(multiplier.multiply(basis, multiplier.operand(drift)).mul_(scale))


def _store(target: Tensor, value: Tensor, accumulate: bool) -> None:
    if not accumulate:
        target.copy_(value)
    elif target.dtype == value.dtype:
        target.add_(value)
    else:
        # The sum is formed in the accumulation dtype and rounded once, as the fused kernels do.
        target.copy_(value.add_(target))
