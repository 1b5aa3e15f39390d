"""Shards of flat tensors: the base of FSDP1's and ZeRO-3's weights, and ZeRO-3's partitions without DeepSpeed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rpsft_kernels.distributed.flat_shard import FlatShardWeight
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.distributed.zero3 import locate_zero3
from rpsft_kernels.private_names import Zero3Parameter

SHAPE = (4, 5)


@pytest.mark.parametrize(
    ("shard", "begin"), [(Shard.whole(SHAPE), 0), (Shard.range(SHAPE, 7, 15), 7), (Shard.nothing(SHAPE), 20)], ids=str
)
def test_a_shard_is_a_view_of_the_flat_tensor(shard: Shard, begin: int) -> None:
    flat = torch.arange(24.0)
    weight = FlatShardWeight(nn.Parameter(torch.empty(0)), SHAPE, shard)
    view = weight.view_shard(flat, begin)
    assert tuple(view.shape) == shard.local_shape
    assert view.flatten().tolist() == list(range(begin, begin + shard.numel))
    view.fill_(-1.0)
    assert int((flat == -1.0).sum()) == shard.numel


def test_gathering_a_parameter_does_not_change_its_state() -> None:
    parameter = nn.Parameter(torch.zeros(8))
    weight = FlatShardWeight(parameter, SHAPE, Shard.range(SHAPE, 0, 8))
    before = weight.state()
    parameter.data = torch.zeros(SHAPE)
    assert weight.state() == before
    parameter.requires_grad_(False)
    assert weight.state() != before
    assert not weight.lasting and not weight.differentiable


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_partitions_of_zero3_are_ranges_without_their_padding(rank: int) -> None:
    whole, length = torch.arange(20.0), 7
    parameter = nn.Parameter(torch.empty(0))
    partition = torch.nn.functional.pad(whole, (0, 1))[length * rank : length * (rank + 1)].clone()
    partition.ds_numel = length  # type: ignore[attr-defined]
    group = SimpleNamespace(rank=lambda: rank, size=lambda: 3)
    marks = {"ds_id": 0, "ds_shape": SHAPE, "ds_numel": 20, "ds_process_group": group, "ds_tensor": partition}
    for name, value in marks.items():
        setattr(parameter, name, value)
    zero3 = Zero3Parameter.of(parameter)
    assert zero3 is not None
    weight = locate_zero3(zero3)
    begin, end = length * rank, min(20, length * (rank + 1))
    assert weight.shard == Shard.range(SHAPE, begin, end)
    assert torch.equal(weight.values(), whole[begin:end])
    assert weight.copies_gradient and not weight.lasting and not weight.differentiable
