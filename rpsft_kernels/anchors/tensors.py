"""The tensors that an anchor is made of, and how they are laid out."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..costs import padded_columns
from ..distributed.shard import Shard

# Elements compared at once when the base is tried in bfloat16.
_TRIAL_ELEMENTS = 1 << 22


def pad_rows(basis: Tensor) -> Tensor:
    """Return ``basis`` (rows, k) as the first k columns of a zero-padded buffer with aligned rows."""
    rows, rank = basis.shape
    stride = padded_columns(rank)
    # The padding of a view that already has some may not be zero: copy it.
    if rank == stride and basis.stride() == (stride, 1) and basis.data_ptr() % 16 == 0:
        return basis
    buffer = basis.new_zeros((rows, stride))
    buffer[:, :rank] = basis
    return buffer[:, :rank]


def exact_base_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype to keep a weight (m, n) in: bfloat16 if that loses nothing, else its own."""
    if weight.dtype == torch.bfloat16:
        return torch.bfloat16
    for rows in torch.split(weight, max(1, _TRIAL_ELEMENTS // weight.shape[1])):
        if not torch.equal(rows.to(torch.bfloat16).to(weight.dtype), rows):
            return weight.dtype
    return torch.bfloat16


def copy_base(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a contiguous copy of ``values`` in ``dtype``."""
    return torch.empty(values.shape, dtype=dtype, device=values.device).copy_(values)


def compute_block(weight: Tensor, left: Tensor, right: Tensor, shard: Shard) -> tuple[Tensor, str]:
    """Compute B = U^T W0 V by the operation that will compute U^T W V, so that they cancel to the last bit.

    Args:
        weight: W0, the values of ``shard``.
        left: the shard's rows of U.
        right: the shard's rows of V.
        shard: the whole weight, or the shard that one rank keeps.

    Returns:
        B (k, k) of the shard, and the arithmetic that computed it.
    """
    backend = ops.resolve_backend(weight.device, weight.dtype)
    block = left.new_zeros((0, 0), dtype=ops.accumulation_dtype(weight.dtype))
    for i, (rect, view) in enumerate(shard.views(weight)):
        rows, cols = rect.within(shard.bounds)
        drifts, _ = ops.project_drift(ops.Operands([view], [left[rows]], [right[cols]]), backend)
        block = block + drifts[0] if i else drifts[0]
    return block, ops.arithmetic_id(backend, weight.device, weight.dtype)
