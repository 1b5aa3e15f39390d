"""Corrections after a step: which share of its drift each weight loses, and pull-backs into the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ..distributed import ReplicatedWeight
from ..distributed.zero3 import ZeroWeight
from ..private_names import is_linked_by_deepspeed
from .bucket import Bucket, BucketTensors
from .gradients import PullBack
from .overlap import find_overlap, lie_apart, overlaps_itself
from .pairing import AnchoredWeight


class Corrections:
    """The weights of one call as the targets of its pull-backs, ``W -= share U C V^T`` (full: ``share (W - W0)``).

    It stands where :class:`Gradients` stands in a call that accumulates; frozen weights stay as they are.

    Args:
        weights: the weights of the call.
        shares: one for each weight.
    """

    def __init__(self, weights: Sequence[AnchoredWeight], shares: Sequence[float]) -> None:
        self._weights, self._shares = weights, shares

    def are_copies(self, bucket: Bucket) -> bool:
        return False

    def pull_backs(self, bucket: Bucket, tensors: BucketTensors) -> Iterator[PullBack]:
        """Yield the pull-back of a bucket, if it has weights to correct."""
        places = {i: place for place, i in enumerate(bucket.members)}
        indices: list[int] = []
        members: list[int] = []
        owners: list[int] = []
        targets: list[Tensor] = []
        first = 0
        for i, count in zip(bucket.busy, bucket.counts, strict=True):
            if count and self._weights[i].weight.requires_grad and self._shares[i] != 0.0:
                indices.append(i)
                members += range(first, first + count)
                owners += [places[i]] * count
                targets += tensors.operands.weights[first : first + count]
            first += count
        if not indices:
            return
        operands = tensors.operands.for_pull_back()
        if len(members) < bucket.matrices:
            operands = operands.pick(members)
        yield PullBack(
            weights=indices,
            grads=[self._weights[i].weight.parameter for i in indices],
            members=members,
            owners=owners,
            operands=operands,
            targets=targets,
            scales=[-self._shares[bucket.members[owner]] for owner in owners],
            accumulate=True,
        )

    def check_memory(self, plan: object) -> None:
        """Raise a ValueError if weights to be corrected share memory."""
        devices: dict[torch.device, dict[int, tuple[str, Tensor]]] = {}
        for anchored in self._weights:
            if anchored.weight.requires_grad and anchored.weight.shard.flat is None and anchored.weight.shard.numel:
                values = anchored.weight.values().detach()
                if overlaps_itself(values):
                    raise ValueError(
                        f"{anchored.name}: got elements that share memory (an expanded tensor, or overlapping "
                        "windows), expected memory for each, because the weight itself is corrected: copy it "
                        "(weight.clone()), or leave it out of the anchors"
                    )
                devices.setdefault(values.device, {})[anchored.weight.identity] = anchored.name, values
        for members in devices.values():
            names, tensors = zip(*members.values(), strict=True)
            if not lie_apart(tensors):
                found = find_overlap(tensors)
                if found is not None:
                    first, second = (names[place] for place in found)
                    raise ValueError(
                        f"{second}: got a weight that shares memory with {first}, expected memory of its own: each "
                        "would be corrected twice; copy it, or leave one of them out of the anchors"
                    )

    def drop_made(self) -> None:
        """Nothing is made before all sums have arrived."""

    def keep_made(self, computed: Sequence[int] | None = None) -> None:
        """Nothing is made."""


def reason_unwritable(anchored: AnchoredWeight) -> str | None:
    """Say why a weight cannot be corrected where it lies; None if nothing stands against it."""
    weight, parameter = anchored.weight, anchored.weight.parameter
    error = weight.gradient_error if isinstance(weight, ReplicatedWeight) else ""
    if error or isinstance(weight, ZeroWeight) or is_linked_by_deepspeed(parameter):
        return (
            "got a parameter of DeepSpeed, whose optimizer keeps the weights that it trains apart and writes over this "
            "one, expected a weight that the optimizer itself updates: use mode 'gradient'"
        )
    if getattr(parameter, "main_grad", None) is not None:
        return (
            "got a parameter with a main_grad (Megatron, Transformer Engine), whose optimizer keeps the weights that "
            "it trains apart, expected a weight that the optimizer itself updates: use mode 'gradient'"
        )
    if parameter.is_inference():
        return "got a parameter that was made in inference mode, expected one that can be trained"
    return None


def read_shares(weights: Sequence[AnchoredWeight], shares: float | Mapping[int, float]) -> list[float]:
    """Return the share of each weight: one for all, or by the ``id`` of its parameter, where every one is needed.

    Raises:
        ValueError: a weight that trains has none.
    """
    if not isinstance(shares, Mapping):
        return [shares] * len(weights)
    found = []
    for anchored in weights:
        share = shares.get(id(anchored.weight.parameter))
        if share is None and anchored.weight.requires_grad:
            raise ValueError(
                f"{anchored.name}: got no learning rate for this weight, expected one for every anchored weight that "
                "trains: it is in no group of the optimizer; leave it out of the anchors (exclude=...) or freeze it"
            )
        found.append(share or 0.0)
    return found
