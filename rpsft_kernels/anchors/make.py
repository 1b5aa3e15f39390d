"""The one way to make an anchor: solve a whole weight once, then lay out the pieces that each of its shards keeps.

A weight that lies in one process is the case of a single shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..checks import check_basis_dtype, check_finite, check_rank, check_weight
from ..costs import is_full
from ..distributed import LocalWeight, Shard
from .subspace import top_subspaces
from .tensors import compute_block, copy_base, exact_base_dtype, pad_rows


@dataclass(frozen=True)
class AnchorOptions:
    """The properties that all anchors of one call share; documented at :meth:`Anchor.from_weight`.

    Raises:
        ValueError: ``rank`` is not a positive int.
    """

    rank: int
    keep_base: bool = True
    basis_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        check_rank(self.rank)

    def effective_ranks(self, weights: Mapping[str, LocalWeight]) -> dict[str, int]:
        """Return k of each weight's anchor, by name."""
        return {name: self.effective_rank(weight.shape) for name, weight in weights.items()}

    def effective_rank(self, shape: tuple[int, ...]) -> int:
        """Return k of the anchor of a weight (m, n): at most min(m, n)."""
        return min(self.rank, *shape)


@dataclass(frozen=True)
class Solution:
    """The facts of a whole weight that the anchors of all its shards record.

    Attributes:
        energy: share of ||W0||_F^2 in the k directions.
        base_dtype: dtype in which W0 is kept; the same for all shards, though each keeps only its own elements.
    """

    energy: float
    base_dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Basis:
    """Rows of U and V (rows, k), of a whole weight or of one shard, in the dtype that anchors keep them in."""

    left: Tensor
    right: Tensor

    def of(self, shard: Shard) -> Basis:
        """Return the rows that belong to ``shard``, as views of a whole weight's."""
        return Basis(self.left[slice(*shard.rows)], self.right[slice(*shard.cols)])


# Tensors made in inference mode could not be saved for a backward pass later.
@torch.inference_mode(False)
@torch.no_grad()
def solve(weight: Tensor, options: AnchorOptions) -> tuple[Solution, Basis | None]:
    """Find the subspaces of a whole weight (m, n); the basis is None where its anchor has the full form.

    Raises:
        ValueError: the weight is not a dense, finite, non-empty floating point matrix, or ``basis_dtype`` does not suit
            its dtype.
        RuntimeError: its subspaces cannot be computed.
    """
    check_weight(weight, "weight")
    if weight.numel() == 0:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected at least one element; leave it out")
    check_basis_dtype(options.basis_dtype, weight.dtype, "basis_dtype")
    weight = weight.detach()
    check_finite(weight, "weight")
    base_dtype = exact_base_dtype(weight)
    if is_full((weight.shape[0], weight.shape[1]), options.rank):
        return Solution(1.0, base_dtype), None
    spaces = top_subspaces(weight, options.rank)
    # The subspaces of a weight on a device without float64 come on the CPU.
    left, right = (side.to(options.basis_dtype).to(weight.device) for side in (spaces.left, spaces.right))
    basis = Basis(left, right)
    return Solution(spaces.energy, base_dtype), basis


@torch.inference_mode(False)
@torch.no_grad()
def anchor_fields(
    values: Tensor, shard: Shard, solution: Solution, basis: Basis | None, options: AnchorOptions
) -> dict[str, Any]:
    """Return the arguments of :class:`Anchor` for one shard, except ``part``.

    Args:
        values: W0 of the shard, of ``shard.local_shape``. The result shares no memory with it.
        shard: the whole weight, or the shard that one rank keeps.
        solution: the facts of the whole weight.
        basis: the shard's rows of U and V; None in the full form.
        options: the properties that all anchors of the call share.
    """
    values = values.detach()
    fields: dict[str, Any] = {
        "shape": shard.shape,
        "weight_dtype": values.dtype,
        "rank": options.effective_rank(shard.shape),
        "energy": solution.energy,
    }
    if basis is not None:
        fields["left"], fields["right"] = pad_rows(basis.left), pad_rows(basis.right)
    if basis is None or options.keep_base:
        fields["base"] = copy_base(values, solution.base_dtype)
    else:
        fields["block"], fields["arithmetic"] = compute_block(values, fields["left"], fields["right"], shard)
    return fields
