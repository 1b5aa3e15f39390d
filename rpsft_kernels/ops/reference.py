"""The operations in plain PyTorch, for any floating dtype up to float64 and any device: the reference.

On the CPU, and on GPUs that multiply bfloat16 no faster, arithmetic is float32; it is float64 for float64 weights, and
for the small second product where there is no base. Other GPUs multiply bfloat16 into float32 sums
(:mod:`rpsft_kernels.ops.products`). With U and V in bfloat16 what is as small as the drift is rounded to bfloat16, as
the Triton kernels do: W - W0 (formed in float32), T, C and P. Everything else is as exact as float32.

Weights are read in blocks of rows. No temporary is as large as a weight on the CPU; on a GPU all temporaries of a block
take at most 256 MiB, with what lies beside a block (U and V in other dtypes, intermediates of (k, min(m, n))) as long
as three quarters of that hold it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import products
from .operands import Operands
from .products import Operand, Parts, Plain, Products, rows_of, transposed


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return "it computes in bfloat16, float16, float32 and float64 only"
    return None


def arithmetic(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    # The library chooses its products by the GPU's generation.
    generation = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return f"{device.type}-{generation}-{products.machine(device).units}"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum over weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _held(base: Tensor, weight: Tensor) -> Tensor:
    """The base as a model of the weight's dtype holds it: a float32 checkpoint cast to bfloat16 has no drift yet."""
    return base.to(weight.dtype)


def _drift_rows(weight: Tensor, base: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    # copy=True: a fresh, aligned buffer makes the bits of the product independent of where the weight lies.
    drift = weight[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
    if base is not None:
        drift -= _held(base[rows], weight).to(dtype)
    return drift


def _drift_bytes(weight: Tensor, base: Tensor | None, dtype: torch.dtype) -> int:
    """Of the temporaries of :func:`_drift_rows`, an element's."""
    return dtype.itemsize + (0 if base is None else dtype.itemsize + weight.dtype.itemsize)


def _rounded_drift_rows(weight: Tensor, base: Tensor, rows: slice) -> Tensor:
    """W - W0, formed in float32 and rounded once to bfloat16."""
    part, held = weight[rows], base[rows]
    if not _subtracted_as_it_is(weight, base):
        held = _held(held, weight)
    if weight.dtype == torch.float16:
        # The difference would be rounded to float16 in between.
        part = part.float()
    # One pass. The difference of bfloat16 numbers is rounded once in any case; a float32 number makes it float32.
    return torch.sub(part, held, out=torch.empty(part.shape, dtype=torch.bfloat16, device=weight.device))


def _subtracted_as_it_is(weight: Tensor, base: Tensor) -> bool:
    """Whether the base's numbers are what a model of the weight's dtype holds, and the subtraction reads them so."""
    return base.dtype == weight.dtype or (weight.dtype == torch.float32 and base.dtype.itemsize == 2)


def _rounded_drift_bytes(weight: Tensor, base: Tensor) -> int:
    held = 0 if _subtracted_as_it_is(weight, base) else weight.dtype.itemsize
    return 2 + held + (4 if weight.dtype == torch.float16 else 0)


class _Moved:
    """W - W0 (or W), block by block, as the operand of a product."""

    def __init__(self, weight: Tensor, base: Tensor | None, how: Products) -> None:
        self.weight, self.base, self.how = weight, base, how

    def rows(self, block: slice) -> Operand:
        if self.base is not None and self.how.rounds:
            return (_rounded_drift_rows(self.weight, self.base, block),)
        if self.base is None and isinstance(self.how, Parts):
            # As in _drift_rows: of a fresh buffer.
            return self.how.operand(self.weight[block].clone(memory_format=torch.contiguous_format))
        return self.how.operand(_drift_rows(self.weight, self.base, block, self.how.dtype))

    @property
    def bytes(self) -> int:
        """Of the temporaries of an element."""
        if self.base is not None and self.how.rounds:
            return _rounded_drift_bytes(self.weight, self.base)
        if self.base is None and isinstance(self.how, Parts):
            return self.weight.dtype.itemsize + self.how.operand_bytes(self.weight.dtype)
        return _drift_bytes(self.weight, self.base, self.how.dtype) + self.how.operand_bytes(self.how.dtype)


def _in_bfloat16(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype == torch.bfloat16


def _project(weight: Tensor, left: Tensor, right: Tensor, base: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    machine = products.machine(weight.device)
    first = products.products(machine, dtype, rounds=base is not None and _in_bfloat16(left, right))
    # Without the base, what the second product sums is as large as the weight: float32 sums would lose the drift.
    # (Apple's GPUs have no float64.)
    second = Plain(torch.float64) if base is None and weight.device.type != "mps" else first
    moved = _Moved(weight, base, first)
    (rows, cols), rank = weight.shape, left.shape[1]
    # Of an intermediate's element: its sum, that of one more product, and what becomes of it.
    between = 2 * first.dtype.itemsize + second.operand_bytes(first.dtype)
    if rows <= cols:
        outer, inner = second.operand(left), first.operand(right)
        drift: Tensor | None = None
        row_bytes = cols * moved.bytes + rank * between
        for block in machine.row_blocks(weight.shape, row_bytes, _bytes_beside(left, right, outer, inner)):
            middle = second.operand(first.multiply(moved.rows(block), inner, coarse=True))
            drift = second.add(drift, transposed(rows_of(outer, block)), middle)
        return weight.new_zeros((rank, rank), dtype=dtype) if drift is None else drift.to(dtype)
    inner, outer = first.operand(left), second.operand(right)
    beside = _bytes_beside(left, right, outer, inner) + rank * cols * between
    blocks = list(machine.row_blocks(weight.shape, cols * moved.bytes, beside))
    # A single block's product is the sum, and may be rounded already; several are added up in float32.
    total = None if len(blocks) == 1 else weight.new_zeros((rank, cols), dtype=first.dtype)
    for block in blocks:
        total = first.add(total, transposed(rows_of(inner, block)), moved.rows(block), coarse=True)
    assert total is not None
    return second.multiply(second.operand(total), outer).to(dtype)


def _bytes_beside(left: Tensor, right: Tensor, *operands: Operand) -> int:
    """Bytes that the operands of products hold beside U and V themselves."""
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
            row_bytes = weight.shape[1] * max(_drift_bytes(weight, base, dtype), 2 * dtype.itemsize)
            for block in machine.row_blocks(weight.shape, row_bytes):
                total += _drift_rows(weight, base, block, dtype).square().sum()
            squares.append(total)
        drifts.append(drift)
    return drifts, torch.stack(squares)


def pull_back_into(
    grads: Sequence[Tensor], operands: Operands, drifts: Sequence[Tensor], scales: Tensor, accumulate: bool
) -> None:
    # The scales may lie on the CPU: a number of it goes into an operator of a GPU like any other.
    for i, grad in enumerate(grads):
        if not operands.full:
            _pull(grad, operands.lefts[i], operands.rights[i], drifts[i], scales[i], accumulate)
            continue
        weight, base = operands.weights[i], operands.pretrained[i]
        dtype = accumulation_dtype(weight.dtype)
        row_bytes = grad.shape[1] * _drift_bytes(weight, base, dtype)
        for block in products.machine(grad.device).row_blocks(grad.shape, row_bytes):
            rows = _drift_rows(weight, base, block, dtype).mul_(scales[i])
            _store(grad[block], rows, accumulate)


def _pull(grad: Tensor, left: Tensor, right: Tensor, drift: Tensor, scale: Tensor, accumulate: bool) -> None:
    machine = products.machine(grad.device)
    how = products.products(machine, accumulation_dtype(drift.dtype), _in_bfloat16(left, right))
    first, second = how.operand(left), how.operand(right)
    # The k x k block goes to the side where it is cheaper.
    if grad.shape[0] <= grad.shape[1]:
        first = _scaled(how, first, drift, scale)
    else:
        second = _scaled(how, second, drift.T, scale)
    second = transposed(second)
    # A product adds itself to gradients of its own dtype. (To bfloat16 perhaps by way of sums that are rounded, which
    # torch allows by default: they are about as far off as P is, that was rounded too.)
    if grad.dtype == (torch.bfloat16 if how.rounds else how.dtype if isinstance(how, Plain) else None):
        row_bytes = 0 if 1 in grad.stride() else grad.shape[1] * grad.element_size()
        for block in machine.row_blocks(grad.shape, row_bytes):
            grad[block].addmm_(first[0][block], second[0], beta=int(accumulate))
    else:
        beside = _bytes_beside(left, right, first, second)
        for block in machine.row_blocks(grad.shape, 2 * how.dtype.itemsize * grad.shape[1], beside):
            _store(grad[block], how.multiply(rows_of(first, block), second), accumulate)


def _scaled(how: Products, basis: Operand, drift: Tensor, scale: Tensor) -> Operand:
    """``P = scale * U C`` as an operand."""
    if how.rounds:
        # Multiplied in float32 and rounded once, in one pass.
        scaled = torch.mul(drift, scale, out=torch.empty(drift.shape, dtype=torch.bfloat16, device=drift.device))
        return how.operand(how.multiply(basis, (scaled,), coarse=True))
    return how.operand(how.multiply(basis, how.operand(drift)).mul_(scale))


def _store(target: Tensor, value: Tensor, accumulate: bool) -> None:
    if not accumulate:
        target.copy_(value)
    elif target.dtype == value.dtype:
        target.add_(value)
    else:
        # The sum is formed in the accumulation dtype and rounded once, as the fused kernels do.
        target.copy_(value.add_(target))
