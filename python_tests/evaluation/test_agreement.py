"""The number that ranks compare depends on every fact that they must share, and on nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from disagreeing_ranks import anchor_zeros, load_parts_of_two_saves
from ranks import run_ranks
from rpsft_kernels import Anchor, use_backend
from rpsft_kernels.distributed import LocalWeight, ReplicatedWeight
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.evaluation.agreement import describe_call, digest, gradient_checksum, members_of
from rpsft_kernels.evaluation.bucket import make_buckets
from rpsft_kernels.evaluation.pairing import AnchoredWeight
from support import random_matrix

SHAPE = (24, 12)
GROUP: Any = SimpleNamespace(group_name="all")


def _anchored(name: str, seed: int, rank: int = 3, dtype: torch.dtype = torch.float32) -> AnchoredWeight:
    """The upper half of a weight, as one of two ranks holds it."""
    pretrained = random_matrix(*SHAPE, dtype, seed=seed)
    parameter = torch.nn.Parameter(pretrained[:12])
    weight = LocalWeight(parameter, SHAPE, Shard.rectangle(SHAPE, (0, 12), (0, 12)), GROUP)
    return AnchoredWeight(name, weight, Anchor.from_weight(pretrained, rank))


def _call() -> list[AnchoredWeight]:
    return [_anchored("up.weight", 0), _anchored("down.weight", 1)]


def _number(weights: list[AnchoredWeight], coeff: float | None = 0.5) -> int:
    description = describe_call(weights, make_buckets(weights), "all")
    return digest(description, members_of(weights, "all"), coeff)


def _freeze(weights: list[AnchoredWeight]) -> None:
    weights[0].weight.parameter.requires_grad_(False)


def _widen_gradient(weights: list[AnchoredWeight]) -> None:
    weights[0].weight.parameter.grad_dtype = torch.float64


def _rename(weights: list[AnchoredWeight]) -> None:
    weights[0].name = "gate.weight"


def _replace(**changes: Any) -> Callable[[list[AnchoredWeight]], None]:
    def change(weights: list[AnchoredWeight]) -> None:
        weights[1] = _anchored("down.weight", **{"seed": 1, **changes})

    return change


CHANGES: dict[str, Callable[[list[AnchoredWeight]], None]] = {
    "name": _rename,
    "values of the subspaces": _replace(seed=2),
    "rank": _replace(rank=4),
    "dtype": _replace(dtype=torch.bfloat16),
    "order": lambda weights: weights.reverse(),
    "number of weights": lambda weights: weights.pop(),  # type: ignore[dict-item, return-value]
    "which weights get gradients": _freeze,
    "dtype of a gradient": _widen_gradient,
}


@pytest.mark.parametrize("change", CHANGES)
def test_ranks_that_differ_have_other_numbers(change: str) -> None:
    weights = _call()
    before = _number(weights)
    CHANGES[change](weights)
    assert _number(weights) != before and 0 <= before < 1 << 62


def test_the_coefficient_is_compared() -> None:
    """None, of a call that adds to no gradients, differs from every number."""
    weights = _call()
    assert len({_number(weights, coeff) for coeff in (0.5, 0.25, -0.5, None)}) == 4


def test_facts_of_one_rank_are_not_compared() -> None:
    """Shards, values and backends may differ between ranks."""
    weights = _call()
    before = _number(weights)
    weights[0].weight.parameter.data.add_(1)
    assert _number(weights) == before
    lower = Shard.rectangle(SHAPE, (12, 24), (0, 12))
    weights[0].weight = replace(weights[0].weight, shard=lower)
    assert _number(weights) == before
    with use_backend("torch"):
        assert _number(weights) == before


def test_weights_of_other_groups_are_not_compared() -> None:
    weights = _call()
    before = _number(weights)
    local = _anchored("local.weight", 5)
    other = SimpleNamespace(group_name="other")
    for group in (None, other):
        local.weight = replace(local.weight, group=group)
        assert _number([*weights, local]) == before


@dataclass(frozen=True)
class _Replica(ReplicatedWeight):
    """A replica whose process group is not used."""


def test_the_checksum_is_that_of_the_smallest_gradient_of_a_replica() -> None:
    weights = _call()
    for anchored in weights:
        anchored.weight.parameter.grad = torch.ones(12, 12)
    assert gradient_checksum(weights) == 0, "gradients of shards differ between ranks in any case"
    replicas = []
    for anchored, shape in zip(_call(), ((4, 4), (12, 12)), strict=True):
        anchored.weight.parameter.data = torch.zeros(shape)
        replica = _Replica(anchored.weight.parameter, shape, Shard.whole(shape), GROUP)
        replicas.append(AnchoredWeight(anchored.name, replica, anchored.anchor))
    assert gradient_checksum(replicas) == 0, "there is no gradient yet"
    gradients = [torch.full(anchored.weight.shape, 2.0) for anchored in replicas]
    for anchored, gradient in zip(replicas, gradients, strict=True):
        anchored.weight.parameter.grad = gradient
    both = gradient_checksum(replicas)
    assert both == gradient_checksum(replicas[:1]) != gradient_checksum(replicas[1:])
    gradients[0][0, 0] = 3.0
    assert gradient_checksum(replicas) != both


def test_the_gradient_that_a_frozen_parameter_was_left_with_does_not_tell() -> None:
    """Where zero_grad(set_to_none=False) has cleared gradients: an optimizer does that for its own parameters alone."""
    anchored, other = _call()[0], torch.nn.Parameter(torch.ones(3, 3))
    other.grad = torch.ones(3, 3)
    parameter = anchored.weight.parameter
    parameter.grad = torch.zeros(12, 12)
    shard = Shard.whole((12, 12))
    replica = _Replica(parameter, (12, 12), shard, GROUP, replicas=lambda: [parameter, other])
    weights = [AnchoredWeight(anchored.name, replica, anchored.anchor)]
    assert gradient_checksum(weights) != 0, "a backward pass may have given it, and zeros to the weight"
    other.requires_grad_(False)
    assert gradient_checksum(weights) == 0


@pytest.mark.parametrize("rank", [8, 24])
def test_ranks_that_anchored_zeros_are_refused(rank: int) -> None:
    """Weights of the full form have no subspaces to tell them apart by; the others have."""
    for outcomes in run_ranks(2, anchor_zeros, rank):
        for wrong in outcomes[:2]:
            assert wrong.kind == "ValueError" and "anchors: got others on" in wrong.message and wrong.unchanged
        assert [right.kind for right in outcomes[2:]] == ["", ""]


def test_parts_of_two_saves_are_refused(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("one", "other")]
    for outcomes in run_ranks(2, load_parts_of_two_saves, paths, 24):
        for wrong in outcomes[:2]:
            assert wrong.kind == "ValueError" and "anchors: got others on" in wrong.message and wrong.unchanged
        assert [right.kind for right in outcomes[2:]] == ["", ""]
