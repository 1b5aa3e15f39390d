"""The operations in plain PyTorch, for any floating dtype up to float64 and any device: the reference.

Arithmetic is float32; it is float64 for float64 weights, and for the small second product where there is no base.
Weights are read in blocks of rows, so that no temporary is as large as a weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of one block of rows: 512 KiB in float32 stays in a core's second-level cache.
_BLOCK_ELEMENTS = 1 << 17


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    if not dtype.is_floating_point or dtype.itemsize < 2:
        return "it computes in bfloat16, float16, float32 and float64 only"
    return None


def arithmetic(device: torch.device) -> str:
    return device.type


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of every sum over weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_blocks(rows: int, cols: int) -> Iterator[slice]:
    # At least four blocks even for a small weight, so that "no m x n temporary" holds at every size.
    step = max(16, min(_BLOCK_ELEMENTS // max(cols, 1), -(-rows // 4)))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _drift_rows(weight: Tensor, base: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
    # copy=True: a fresh, aligned buffer makes the bits of the product independent of where the weight lies.
    drift = weight[rows].to(dtype, copy=True, memory_format=torch.contiguous_format)
    if base is not None:
        # The base as a model of this dtype holds it: a float32 checkpoint cast to bfloat16 has no drift yet.
        drift -= base[rows].to(weight.dtype).to(dtype)
    return drift


def _project(weight: Tensor, left: Tensor, right: Tensor, base: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(weight.dtype)
    # Without the base, what the second product sums is as large as the weight: float32 sums would lose the drift.
    # (Apple's GPUs have no float64.)
    wide = torch.float64 if base is None and weight.device.type != "mps" else dtype
    (rows, cols), rank = weight.shape, left.shape[1]
    if rows <= cols:
        left, right = left.to(wide), right.to(dtype)
        drift = weight.new_zeros((rank, rank), dtype=wide)
        for block in _row_blocks(rows, cols):
            drift.addmm_(left[block].T, (_drift_rows(weight, base, block, dtype) @ right).to(wide))
        return drift.to(dtype)
    left, right = left.to(dtype), right.to(wide)
    first = weight.new_zeros((rank, cols), dtype=dtype)
    for block in _row_blocks(rows, cols):
        first.addmm_(left[block].T, _drift_rows(weight, base, block, dtype))
    return (first.to(wide) @ right).to(dtype)


def project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
) -> tuple[list[Tensor], Tensor]:
    drifts: list[Tensor] = []
    squares = weights[0].new_empty((len(weights),), dtype=accumulation_dtype(weights[0].dtype))
    for i, weight in enumerate(weights):
        dtype = squares.dtype
        base = bases[i] if bases else None
        if lefts:
            drift = _project(weight, lefts[i], rights[i], base)
            if blocks:
                drift -= blocks[i]
            squares[i] = drift.square().sum()
        else:
            drift = weight.new_empty((0, 0), dtype=dtype)
            squares[i].zero_()
            for block in _row_blocks(*weight.shape):
                squares[i] += _drift_rows(weight, base, block, dtype).square().sum()
        drifts.append(drift)
    return drifts, squares


def pull_back_into(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
) -> None:
    for i, grad in enumerate(grads):
        scale = scales[i]
        if not lefts:
            for block in _row_blocks(*grad.shape):
                rows = _drift_rows(weights[i], bases[i], block, scales.dtype).mul_(scale)
                _store(grad[block], rows, accumulate)
            continue
        dtype = accumulation_dtype(drifts[i].dtype)
        left, right = lefts[i].to(dtype), rights[i].to(dtype)
        # The k x k block goes to the side where it is cheaper.
        if grad.shape[0] <= grad.shape[1]:
            left = (left @ drifts[i]).mul_(scale)
        else:
            right = (right @ drifts[i].T).mul_(scale)
        for block in _row_blocks(*grad.shape):
            if grad.dtype == dtype:
                grad[block].addmm_(left[block], right.T, beta=int(accumulate))
            else:
                _store(grad[block], left[block] @ right.T, accumulate)


def _store(target: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        # The sum is formed in the accumulation dtype and rounded once, as the fused kernels do.
        target.copy_(value.add_(target))
    else:
        target.copy_(value)
