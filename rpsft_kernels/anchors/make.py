"""The one way to make an anchor: solve a whole weight once, then lay out the pieces that each of its shards keeps.

A weight that lies in one process is the case of a single shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..checks import check_basis_dtype, check_finite, check_weight, read_rank
from ..costs import is_full
from ..distributed import LocalWeight, Shard
from .random_subspace import random_subspaces
from .subspace import Subspaces, largest_rank, subspaces_of_share, top_subspaces
from .tensors import compute_block, copy_base, exact_base_dtype, pad_rows

Subspace = Literal["singular", "random"]
SUBSPACES: tuple[Subspace, ...] = get_args(Subspace)


@dataclass(frozen=True)
class AnchorOptions:
    """The properties that all anchors of one call share; documented at :meth:`Anchors.from_model`.

    Raises:
        ValueError: ``rank`` is neither a positive int nor a float between 0 and 1, or there is no such ``subspace`` or
            ``seed``.
    """

    rank: int | float
    keep_base: bool = True
    basis_dtype: torch.dtype = torch.bfloat16
    subspace: Subspace = "singular"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", read_rank(self.rank))
        if self.subspace not in SUBSPACES:
            raise ValueError(
                f"subspace: got {self.subspace!r}, expected 'singular', or 'random' for the control of an experiment"
            )
        check_seed(self.seed, "seed")

    @property
    def share(self) -> float | None:
        """The share of energy that was asked for; None where a number of directions was."""
        return self.rank if isinstance(self.rank, float) else None

    @property
    def random_seed(self) -> int | None:
        """The seed of random subspaces; None where they are singular."""
        return self.seed if self.subspace == "random" else None

    def planned_ranks(self, weights: Mapping[str, LocalWeight]) -> dict[str, int]:
        """Return k that each weight's anchor is planned for, by name: see :func:`plan_rank`."""
        return {name: plan_rank(weight.shape, self.rank) for name, weight in weights.items()}

    def without_base(self, weights: Mapping[str, LocalWeight]) -> set[str]:
        """Return the names of the weights whose anchors are planned to keep no W0."""
        planned = {} if self.keep_base else self.planned_ranks(weights)
        return {
            name
            for name, rank in planned.items()
            if not is_full((weights[name].shape[0], weights[name].shape[1]), rank)
        }


def plan_rank(shape: tuple[int, ...], rank: int | float) -> int:
    """Return k of the anchor of a weight (m, n), or for a share of energy the largest that it can be.

    Only the singular values tell which k has a share. The work on replicated weights is divided before any is computed,
    and again when anchors are loaded: by this number, which all ranks know.
    """
    return largest_rank(shape, rank) if isinstance(rank, float) else min(rank, *shape)


def check_seed(seed: object, name: str) -> None:
    """Raise a ValueError under ``name`` unless ``seed`` is an int of at least 0."""
    if type(seed) is not int or seed < 0:
        raise ValueError(f"{name}: got {seed!r}, expected an int of at least 0")


@dataclass(frozen=True)
class Solution:
    """The facts of a whole weight that the anchors of all its shards record.

    Attributes:
        rank: k; min(m, n) in the full form.
        energy: share of ||W0||_F^2 in the k directions.
        base_dtype: dtype in which W0 is kept; the same for all shards, though each keeps only its own elements.
    """

    rank: int
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
def solve(weight: Tensor, options: AnchorOptions, name: str = "") -> tuple[Solution, Basis | None]:
    """Find the subspaces of a whole weight (m, n); the basis is None where its anchor has the full form.

    Random subspaces depend on ``name``. Their rank for a share of energy is that of the singular ones.

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
    found = _find_subspaces(weight, options, name)
    if found is None:
        return Solution(min(weight.shape), 1.0, base_dtype), None
    left, right, energy = found
    # The subspaces of a weight on a device without float64 come on the CPU.
    left, right = (side.to(options.basis_dtype).to(weight.device) for side in (left, right))
    return Solution(left.shape[1], energy, base_dtype), Basis(left, right)


def _find_subspaces(weight: Tensor, options: AnchorOptions, name: str) -> tuple[Tensor, Tensor, float] | None:
    """Return U and V in float64, and the energy between them; None where the anchor has the full form."""
    spaces: Subspaces | None
    if isinstance(options.rank, float):
        spaces = subspaces_of_share(weight, options.rank)
        if spaces is None:
            return None
        rank = spaces.left.shape[1]
    else:
        rank = options.rank
        if is_full((weight.shape[0], weight.shape[1]), rank):
            return None
        spaces = None if options.random_seed is not None else top_subspaces(weight, rank)
    if options.random_seed is not None:
        return random_subspaces(weight, rank, options.random_seed, name)
    assert spaces is not None
    return spaces.left, spaces.right, spaces.energy


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
        "rank": solution.rank,
        "energy": solution.energy,
        "share": options.share,
    }
    if basis is not None:
        fields["left"], fields["right"] = pad_rows(basis.left), pad_rows(basis.right)
        fields["random_seed"] = options.random_seed
    if basis is None or options.keep_base:
        fields["base"] = copy_base(values, solution.base_dtype)
    else:
        fields["block"], fields["arithmetic"] = compute_block(values, fields["left"], fields["right"], shard)
    return fields
