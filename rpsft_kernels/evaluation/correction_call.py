"""A call that takes a share of their drift out of the weights themselves, after the optimizer's step."""

from __future__ import annotations

import hashlib

from torch import Tensor

from .agreement import members_of
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

    def correct_(self) -> Tensor:
        """Correct the weights, and return R of before."""
        shared, summands = self._project_shared()
        decide = self._request.decide
        if decide is None:
            self._pull_back_shared(shared)
            squares = [self._project_and_pull_back(bucket) for bucket in self._local]
            total = self._total(squares + summands)
        else:
            local = [self._project(bucket) for bucket in self._local]
            total = self._total([projected.squares for projected in local] + summands)
            share = decide(total)
            if share == 0.0:
                return total
            for place, pulls in self._pulls.items():
                self._pulls[place] = [pull._replace(scales=[-share] * len(pull.scales)) for pull in pulls]
            self._pull_back_shared([*shared, *local])
        for name, group_call in self.group_calls.items():
            moving = {id(w) for w, share in zip(self.weights, self._shares, strict=True) if share != 0.0}
            moved = [w for w in members_of(self.weights, name) if w.weight.requires_grad and id(w) in moving]
            exchange_shares(moved, group_call)
        return total
