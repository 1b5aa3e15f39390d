"""The masters of DeepSpeed ZeRO-1 and 2 without DeepSpeed: where they are found, and what stands for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rpsft_kernels.distributed import Shard
from rpsft_kernels.distributed.partition import divide
from rpsft_kernels.distributed.zero_replica import ZeroReplica, ZeroReplicaMaster
from rpsft_kernels.private_names import find_master_range

SHAPES = [(3, 5), (4, 8), (7, 3), (2, 4)]


class Group:
    """The part of a process group that tells a rank and a size."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def engines(size: int, **changed: Any) -> tuple[list[nn.Parameter], list[Any], Tensor]:
    """Return parameters, each rank's engine, and all masters, laid end to end as the parameters are."""
    count = sum(m * n for m, n in SHAPES)
    masters = torch.randn(-(-count // size) * size, generator=torch.Generator().manual_seed(1))
    flat, parameters, first = masters.bfloat16(), [], 0
    for m, n in SHAPES:
        parameter = nn.Parameter(flat[first : first + m * n].view(m, n))
        parameter._hp_mapping = None  # type: ignore[attr-defined]
        parameters.append(parameter)
        first += m * n
    found = []
    for rank in range(size):
        optimizer = SimpleNamespace(
            bit16_groups_flat=[torch.zeros(4), flat],
            single_partition_of_fp32_groups=[torch.zeros(4), masters.chunk(size)[rank].clone()],
            real_dp_process_group=[None, Group(rank, size)],
            cpu_offload=False,
        )
        vars(optimizer).update(changed)
        found.append(SimpleNamespace(optimizer=optimizer))
    return parameters, found, masters


def group_of(engine: Any) -> Any:
    return engine.optimizer.real_dp_process_group[1]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranges_make_up_the_weights(size: int) -> None:
    parameters, found, masters = engines(size)
    first = 0
    for parameter in parameters:
        count = parameter.numel()
        ranges = [find_master_range(engine, parameter, group_of(engine)) for engine in found]
        present = [each for each in ranges if each is not None and each.begin < each.end]
        assert [each.begin for each in present] == [0, *(each.end for each in present[:-1])]
        assert len(ranges) == size and present[-1].end == count
        assert {each.undivided for each in ranges if each is not None} == {len(present) == 1}
        assert torch.equal(torch.cat([each.masters for each in present]), masters[first : first + count])
        first += count


def test_a_master_stands_for_its_parameter() -> None:
    parameters, found, masters = engines(3)
    with torch.no_grad():
        parameters[1][2, 3] = 7.0
    values, gradients = torch.zeros(32), torch.zeros(32)
    for engine in found:
        weight = ZeroReplica(parameters[1], (4, 8), Shard.whole((4, 8)), group_of(engine), engine=lambda e=engine: e)
        assert weight.master is weight or weight.own_share == weight.shard
        assert weight.own_share is not None
        master = weight.with_work(weight.own_share).master
        assert isinstance(master, ZeroReplicaMaster) and master.dtype == torch.float32 and not master.is_copy
        assert master.shown.dtype == torch.bfloat16 and torch.equal(
            master.shown.values(), weight.own_share.of(parameters[1])
        )
        begin, end = weight.own_share.flat or (0, 0)
        values[begin:end] = master.values().detach().view(-1)
        parameters[1].grad = None
        (master.values().view(-1) * torch.arange(begin, end)).sum().backward()
        assert parameters[1].grad is not None
        gradients += parameters[1].grad.view(-1)
    wanted = masters[15:47].clone()
    # Somebody has written into the model alone.
    wanted[19] = 7.0
    assert torch.equal(values, wanted)
    assert torch.equal(gradients, torch.arange(32.0))


def test_all_ranks_find_another_division_of_the_work() -> None:
    parameters, found, _ = engines(3)
    for parameter in parameters:
        m, n = parameter.shape
        for engine, share in zip(found, divide([(m, n)], [1], 3)[0], strict=True):
            whole = Shard.whole((m, n))
            weight = ZeroReplica(parameter, (m, n), whole, group_of(engine), engine=lambda e=engine: e)
            assert isinstance(weight.with_work(weight.own_share).master, ZeroReplicaMaster)
            # One rank or another has an empty share in both divisions.
            other = weight.with_work(share)
            assert other.master is other


def test_one_rank_has_all_masters() -> None:
    parameters, (engine,), masters = engines(1)
    weight = ZeroReplica(parameters[1], (4, 8), Shard.whole((4, 8)), engine=lambda: engine)
    assert isinstance(weight.master, ZeroReplicaMaster)
    assert torch.equal(weight.master.values(), masters[15:47].view(4, 8))


def test_masters_that_are_not_at_hand() -> None:
    parameters, (engine, _), _ = engines(2)
    group = group_of(engine)
    assert find_master_range(engine, parameters[0], group) is not None
    assert find_master_range(engine, nn.Parameter(parameters[0].detach().clone()), group) is None
    assert find_master_range(engine, parameters[0], None) is None
    assert find_master_range(SimpleNamespace(optimizer=None), parameters[0], group) is None
    for changed in (
        {"cpu_offload": True},
        {"single_partition_of_fp32_groups": [torch.zeros(4), torch.zeros(38, dtype=torch.bfloat16)]},
        {"single_partition_of_fp32_groups": [torch.zeros(4), torch.zeros(38, device="meta")]},
    ):
        parameters, (engine, _), _ = engines(2, **changed)
        assert find_master_range(engine, parameters[0], group_of(engine)) is None
