"""The tensors that one call of an operation reads, and the dtypes in which backends read them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Operands(NamedTuple):
    """N weights of one anchor form, dtype and device. A field holds one tensor per weight, or nothing:

    ========== ============== ============== ============ ==================
    form       lefts, rights  pretrained     blocks       drift
    ========== ============== ============== ============ ==================
    base       U, V           W0             --           U^T (W - W0) V
    block      U, V           --             B            U^T W V - B
    bare       U, V           --             --           U^T W V
    full       --             W0             --           (0, 0): W - W0 itself
    ========== ============== ============== ============ ==================

    Attributes:
        weights: W (m, n), bfloat16, float16, float32 or float64, any strides. ``pull_back`` reads them, and
            ``pretrained``, for full anchors only.
        lefts: U (m, k), any floating dtype. bfloat16 is used as it is where V is bfloat16 too.
        rights: V (n, k).
        pretrained: W0 (m, n), any floating dtype; read as a weight of W's dtype holds it.
        blocks: B (k, k) in float32 (float64 for float64 weights).
    """

    weights: Sequence[Tensor] = ()
    lefts: Sequence[Tensor] = ()
    rights: Sequence[Tensor] = ()
    pretrained: Sequence[Tensor] = ()
    blocks: Sequence[Tensor] = ()

    @property
    def full(self) -> bool:
        """True for full anchors, whose weights are not projected."""
        return not self.lefts

    def pick(self, indices: Iterable[int]) -> Operands:
        """Return the operands of some of the weights, in the order of ``indices``."""
        chosen = list(indices)
        return Operands(*([column[i] for i in chosen] if column else [] for column in self))

    def for_pull_back(self) -> Operands:
        """Return the operands that ``pull_back`` reads: U and V, or W and W0 of full anchors."""
        if self.full:
            return Operands(weights=self.weights, pretrained=self.pretrained)
        return Operands(lefts=self.lefts, rights=self.rights)

    def cast_subspaces(self) -> Operands:
        """Cast each U and V to one dtype that compiled kernels read: bfloat16 where both are, else float32."""
        if all(u.dtype == v.dtype in (torch.bfloat16, torch.float32) for u, v in self._subspaces()):
            return self
        lefts, rights = [], []
        for left, right in self._subspaces():
            dtype = torch.bfloat16 if left.dtype == right.dtype == torch.bfloat16 else torch.float32
            lefts.append(left.to(dtype))
            rights.append(right.to(dtype))
        return self._replace(lefts=lefts, rights=rights)

    def _subspaces(self) -> Iterable[tuple[Tensor, Tensor]]:
        return zip(self.lefts, self.rights, strict=True)


def cast_base(weight: Tensor, base: Tensor, readable: Container[tuple[torch.dtype, torch.dtype]]) -> Tensor:
    """Cast W0 to a dtype that a backend reads beside W: its own, else W's, as which the backend uses it in any case.

    Args:
        weight: W (m, n).
        base: W0 (m, n).
        readable: the pairs of dtypes of W and W0 that the backend reads.
    """
    return base if (weight.dtype, base.dtype) in readable else base.to(weight.dtype)
