"""The tensors that an anchor is made of: what they must be, and how they are laid out."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..costs import padded_columns
from ..distributed.shard import Shard

# Elements compared at once when the base is tried in bfloat16.
_TRIAL_ELEMENTS = 1 << 22


def padded(basis: Tensor) -> Tensor:
    """``basis`` (rows, k) as the first k columns of a zero-padded buffer with aligned rows."""
    rows, rank = basis.shape
    stride = padded_columns(rank)
    # Of a view with padding already, nothing tells that the padding is zero.
    if rank == stride and basis.stride() == (stride, 1) and basis.data_ptr() % 16 == 0:
        return basis
    buffer = basis.new_zeros((rows, stride))
    buffer[:, :rank] = basis
    return buffer[:, :rank]


def base_copy(weight: Tensor) -> Tensor:
    """A contiguous copy of ``weight``: in bfloat16 if that loses nothing, else in its own dtype."""
    if weight.dtype == torch.bfloat16:
        return weight.clone(memory_format=torch.contiguous_format)
    rows = max(1, _TRIAL_ELEMENTS // weight.shape[1])
    small = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device)
    for source, target in zip(torch.split(weight, rows), torch.split(small, rows), strict=True):
        target.copy_(source)
        if not torch.equal(target.to(weight.dtype), source):
            return weight.clone(memory_format=torch.contiguous_format)
    return small


def computed_block(weight: Tensor, left: Tensor, right: Tensor, part: Shard) -> tuple[Tensor, str]:
    """B = U^T W0 V by the operation that will compute U^T W V, so that they cancel to the last bit.

    ``weight`` is the part at hand, ``left`` and ``right`` its rows of U and V.
    """
    backend = ops.resolve_backend(weight.device, weight.dtype)
    block = left.new_zeros((0, 0), dtype=ops.accumulation_dtype(weight.dtype))
    for i, (tile, view) in enumerate(part.views(weight)):
        rows, cols = tile.within(part.bounds)
        drifts, _ = ops.project_drift(ops.Operands([view], [left[rows]], [right[cols]]), backend)
        block = block + drifts[0] if i else drifts[0]
    return block, ops.arithmetic_id(backend, weight.device, weight.dtype)
