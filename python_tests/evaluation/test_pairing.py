"""A shard's matrices, each with its rows of U, V and W0, make up the shard's C. Refusals are in test_penalty.py."""

from __future__ import annotations

import pytest
import torch

from rpsft_kernels import Anchor
from rpsft_kernels.distributed import LocalWeight
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.evaluation.pairing import AnchoredWeight
from support import random_matrix

SHAPE = (7, 5)
SHARDS = {
    "whole": Shard.whole(SHAPE),
    "rows": Shard.rectangle(SHAPE, (2, 6), (0, 5)),
    "block": Shard.rectangle(SHAPE, (1, 4), (2, 5)),
    "range": Shard.range(SHAPE, 3, 29),
    "inside a row": Shard.range(SHAPE, 11, 14),
    "two half rows": Shard.range(SHAPE, 8, 12),
    "nothing": Shard.nothing(SHAPE),
}


@pytest.mark.parametrize("shard", SHARDS.values(), ids=list(SHARDS))
def test_the_matrices_of_a_shard_add_up_to_its_drift(shard: Shard) -> None:
    pretrained = random_matrix(*SHAPE, torch.float64)
    weight = pretrained + random_matrix(*SHAPE, torch.float64, seed=1)
    anchor = Anchor.from_weight(pretrained, 2)
    assert anchor.left is not None and anchor.right is not None
    difference = torch.zeros_like(weight)
    shard_of_difference = shard.of(difference)
    shard_of_difference.copy_(shard.of(weight - pretrained))
    anchored = AnchoredWeight("weight", LocalWeight(weight, SHAPE, shard), anchor)
    matrices = anchored.matrices(shard.of(weight))
    assert len(matrices) == len(shard.rects)
    drift = torch.zeros(2, 2, dtype=torch.float64)
    for matrix in matrices:
        assert matrix.left is not None and matrix.right is not None and matrix.base is not None
        drift += matrix.left.double().T @ (matrix.values - matrix.base) @ matrix.right.double()
    torch.testing.assert_close(drift, anchor.left.double().T @ difference @ anchor.right.double())


@pytest.mark.parametrize("shard", SHARDS.values(), ids=list(SHARDS))
def test_one_matrix_is_the_tensors_themselves(shard: Shard) -> None:
    weight = random_matrix(*SHAPE)
    anchor = Anchor.from_weight(weight, 2)
    anchored = AnchoredWeight("weight", LocalWeight(weight, SHAPE, shard), anchor)
    assert anchored.is_one_matrix == shard.is_whole
    if anchored.is_one_matrix:
        (matrix,) = anchored.matrices(weight)
        assert matrix.values is weight
        assert matrix.left is anchor.left and matrix.right is anchor.right and matrix.base is anchor.base
