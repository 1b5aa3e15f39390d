"""A call that takes a share of their drift out of the weights themselves, after the optimizer's step."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .agreement import members_of
from .bucket import Bucket, ProjectedBucket
from .call import Call
from .corrections import Corrections, read_shares
from .exchange import exchange_shares
from .plan import PlannedWeights
from .requests import CorrectionRequest


class CorrectionCall(Call):
    """See :class:`CorrectionRequest`. All sums have arrived and are finite before a weight changes."""

    def __init__(self, planned: PlannedWeights, request: CorrectionRequest) -> None:
        super().__init__(planned, request)
        self._request = request
        shares = read_shares(self.weights, 1.0 if request.decide is not None else request.shares)
        self._shares = shares
        self.gradients = Corrections(self.weights, shares)
        # Where R decides the share, all C are there before the first weight changes.
        self._keeps_drifts = request.decide is not None

    def stage(self) -> None:
        if self._adapted is not None:
            raise ValueError(
                f"model: got weights that adapters move ({', '.join(self._adapted_names[:3])}, ...), expected weights "
                "that train themselves: a drift that is a product of factors cannot be taken out of them after the "
                "step. Use mode 'gradient', with a coeff or a budget"
            )
        if any(bucket.matrices and bucket.program is None for bucket in self._plan.buckets):
            raise ValueError(
                "weights: got tensors that only stand for others (fake or negated ones, or a traced call), expected "
                "weights with memory of their own: the modes after the step correct them where they lie; call it "
                "outside of torch.compile"
            )
        super().stage()

    def _describe(self, group_name: str) -> bytes:
        facts = [
            (share, anchored.weight.requires_grad)
            for anchored, share in zip(self.weights, self._shares, strict=True)
            if anchored.weight.group_name == group_name
        ]
        own = repr((self._request.key, facts)).encode()
        return hashlib.blake2b(super()._describe(group_name) + own, digest_size=8).digest()

    def correct_(self) -> tuple[Tensor, Tensor]:
        """Correct the weights; returns R as it was, and as it is now (exact for orthonormal U and V)."""
        shared, summands = self._project_shared()
        decide, shares = self._request.decide, self._shares
        if decide is None:
            self._pull_back_shared(shared)
            local = [(bucket, self._project_and_pull_back(bucket)) for bucket in self._local]
            found, by_weight = self._measure(shared, local, summands)
        else:
            projected = [self._project(bucket) for bucket in self._local]
            found, by_weight = self._measure(shared, [(p.bucket, p.squares) for p in projected], summands)
            share = decide(found, found if by_weight is None else self._sum_of_moving(by_weight))
            if share == 0.0:
                return found, found
            shares = [share] * len(self.weights)
            for place, pulls in self._pulls.items():
                self._pulls[place] = [pull._replace(scales=[-share] * len(pull.scales)) for pull in pulls]
            self._pull_back_shared([*shared, *projected])
        moved = [anchored for anchored, moves in zip(self.weights, self._moves, strict=True) if moves]
        for name, group_call in self.group_calls.items():
            exchange_shares(members_of(moved, name), group_call)
        # The kernels wrote to what lies here of a DTensor, and a replica has shares of other ranks.
        torch.autograd.graph.increment_version([anchored.weight.parameter for anchored in moved])
        if by_weight is None:
            return found, found * (1.0 - shares[0]) ** 2
        kept = [(1.0 - share) ** 2 if moves else 1.0 for share, moves in zip(shares, self._moves, strict=True)]
        return found, (by_weight * torch.tensor(kept, dtype=by_weight.dtype, device="cpu").to(by_weight.device)).sum()

    @property
    def _moves(self) -> list[bool]:
        """Which weights are corrected."""
        return [
            anchored.weight.requires_grad and share != 0.0
            for anchored, share in zip(self.weights, self._shares, strict=True)
        ]

    def _measure(
        self,
        shared: Sequence[ProjectedBucket],
        local: Sequence[tuple[Bucket, Tensor]],
        summands: Sequence[Tensor],
    ) -> tuple[Tensor, Tensor | None]:
        """Return R, and R of each weight if they do not all lose the same share; else None."""
        total = self._total([*(squares for _, squares in local), *summands])
        alike = len(set(self._shares)) == 1 and all(anchored.weight.requires_grad for anchored in self.weights)
        return total, None if alike else self._split_by_weight(shared, local)

    def _sum_of_moving(self, by_weight: Tensor) -> Tensor:
        places = [i for i, moves in enumerate(self._moves) if moves]
        return torch.stack([by_weight[i] for i in places]).sum()
