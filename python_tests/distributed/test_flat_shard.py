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


def make_trained(**changes: object) -> nn.Parameter:
    """Make a parameter (4, 5) in bfloat16 as the second of three ranks has it, elements 7 to 14 and no padding, whose
    optimizer keeps masters a third of a rounding step away.
    """
    copies = (1 + torch.arange(7.0) / 8).bfloat16()
    copies.ds_numel = 7  # type: ignore[attr-defined]
    masters = torch.zeros(20)
    masters[4:11] = copies.float() * (1 + 2**-10)
    optimizer = SimpleNamespace(
        offload_optimizer=False,
        fp32_partitioned_groups_flat=[torch.zeros(3), masters.requires_grad_()],
        grad_position={5: [1, 4, 7]},
        get_param_id=lambda parameter: parameter.ds_id,
        loss_scale=1.0,
    )
    vars(optimizer).update(changes)
    parameter = nn.Parameter(torch.empty(0, dtype=torch.bfloat16))
    group = SimpleNamespace(rank=lambda: 1, size=lambda: 3)
    marks = {"ds_id": 5, "ds_shape": SHAPE, "ds_numel": 20, "ds_process_group": group, "ds_tensor": copies}
    for name, value in {**marks, "_z3_optimizer": optimizer}.items():
        setattr(parameter, name, value)
    return parameter


def test_masters_count_where_they_round_to_the_model() -> None:
    parameter = make_trained()
    weight = locate_zero3(Zero3Parameter(parameter))
    assert weight.is_copy and weight.dtype == torch.bfloat16 and weight.shown is weight
    master = weight.master
    assert not master.is_copy and master.dtype == torch.float32 and master.master is master
    assert master.shown == weight and master.state() != weight.state()
    exact = parameter._z3_optimizer.fp32_partitioned_groups_flat[1][4:11].detach()  # type: ignore[attr-defined]
    assert torch.equal(master.values(), exact) and not master.values().requires_grad
    assert torch.equal(weight.values().float(), exact.bfloat16().float())
    # Written into the model alone: a loaded checkpoint, say, and what has overflowed.
    partition = parameter.ds_tensor  # type: ignore[attr-defined]
    exact[3] = torch.inf
    partition[1], partition[2], partition[3] = -2.0, torch.nan, torch.inf
    found = master.values()
    assert found[1] == -2.0 and found[2].isnan() and found[3] == torch.inf
    assert torch.equal(found[[0, 4, 5, 6]], exact[[0, 4, 5, 6]])


@pytest.mark.parametrize(
    "changes",
    [
        {"offload_optimizer": True, "fp32_partitioned_groups_flat": []},
        {"fp32_partitioned_groups_flat": [torch.zeros(3), torch.zeros(20, dtype=torch.bfloat16)]},
        {"fp32_partitioned_groups_flat": [torch.zeros(3), torch.zeros(20, device="meta")]},
        {"grad_position": {}},
        {"grad_position": {5: [1, 4, 6]}},
    ],
    ids=["offloaded", "16 bits", "moved away", "frozen at first", "another size"],
)
def test_masters_that_are_not_at_hand(changes: dict[str, object]) -> None:
    weight = locate_zero3(Zero3Parameter(make_trained(**changes)))
    assert weight.master is weight and weight.is_copy


def test_a_frozen_parameter_is_no_copy_of_a_master() -> None:
    weight = locate_zero3(Zero3Parameter(make_trained().requires_grad_(False)))  # type: ignore[arg-type]
    assert weight.master is weight and not weight.is_copy
