"""Buckets: their limits, their order, and the weights that share one."""

from __future__ import annotations

import itertools
import random

import pytest

from rpsft_kernels.ops import BucketLimits, WeightSpec, intermediate_parts, limits_of, plan_buckets

WIDE = BucketLimits(weights=1000, elements=1 << 60, workspace_bytes=1 << 60)


def random_specs(seed: int) -> list[WeightSpec]:
    choice = random.Random(seed).choice
    return [
        WeightSpec(choice((1, 8, 30, 64)), choice((1, 8, 30, 64)), choice((0, 1, 8)), choice("ab")) for _ in range(60)
    ]


def test_nothing_to_plan() -> None:
    assert plan_buckets([]) == []


def test_one_class_fills_buckets_in_order() -> None:
    specs = [WeightSpec(16, 32, 4)] * 20
    assert plan_buckets(specs, BucketLimits()) == [list(range(16)), list(range(16, 20))]
    assert plan_buckets(specs, BucketLimits(weights=20)) == [list(range(20))]
    assert plan_buckets(specs, BucketLimits(weights=1)) == [[i] for i in range(20)]


def test_a_gpu_gets_as_many_small_weights_as_keep_it_busy() -> None:
    small, large = WeightSpec(896, 896, 128), WeightSpec(4096, 4096, 128)
    assert plan_buckets([small] * 100) == [list(range(100))]
    # 16 of these have as many elements as it takes.
    assert plan_buckets([large] * 20) == [list(range(16)), list(range(16, 20))]
    mixed = [small] * 300 + [large] * 16 + [small] * 3
    assert [len(bucket) for bucket in plan_buckets(mixed)] == [302, 17]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        (BucketLimits(elements=3 * 512), [[0, 1, 2], [3, 4, 5], [6]]),
        (BucketLimits(elements=3 * 512 - 1), [[0, 1], [2, 3], [4, 5], [6]]),
        # 2 bytes x shorter side 16 x rank 4.
        (BucketLimits(workspace_bytes=4 * 128), [[0, 1, 2, 3], [4, 5, 6]]),
        (BucketLimits(workspace_bytes=4 * 128 - 1), [[0, 1, 2], [3, 4, 5], [6]]),
        (BucketLimits(weights=3, elements=2 * 512, workspace_bytes=5 * 128), [[0, 1], [2, 3], [4, 5], [6]]),
    ],
)
def test_limits_are_reached_and_not_passed(limits: BucketLimits, expected: list[list[int]]) -> None:
    assert plan_buckets([WeightSpec(16, 32, 4)] * 7, limits) == expected


def test_a_weight_beyond_the_limits_goes_alone() -> None:
    small, large = WeightSpec(16, 32, 4), WeightSpec(1600, 3200, 400)
    for limits in (BucketLimits(elements=4 * 512), BucketLimits(workspace_bytes=4 * 128)):
        assert plan_buckets([large], limits) == [[0]]
        assert plan_buckets([small, small, large, small, small], limits) == [[0, 1], [2], [3, 4]]
        assert plan_buckets([large, large], limits) == [[0], [1]]


def test_the_workspace_lies_along_the_shorter_side() -> None:
    assert WeightSpec(16, 3200, 4).workspace_bytes == WeightSpec(3200, 16, 4).workspace_bytes == 2 * 16 * 4
    # A full anchor has no workspace: only its elements count.
    assert WeightSpec(1600, 3200, 0).workspace_bytes == 0
    assert plan_buckets([WeightSpec(1600, 3200, 0)] * 3, BucketLimits(workspace_bytes=1)) == [[0, 1, 2]]
    # The columns of a vocabulary are summed in 4 stretches, and so are the rows that C is the sum of.
    assert WeightSpec(128256, 16, 4).workspace_bytes == 4 * 2 * 16 * 4 + 4 * 4 * 16


def test_orientation_form_and_key_separate_buckets() -> None:
    wide, tall, square = WeightSpec(16, 32, 4, "a"), WeightSpec(32, 16, 4, "a"), WeightSpec(16, 16, 4, "a")
    full, other = WeightSpec(16, 32, 0, "a"), WeightSpec(16, 32, 4, "b")
    # A square weight is contracted like a wide one.
    specs = [wide, tall, square, full, other, tall, wide, other, full]
    assert plan_buckets(specs, WIDE) == [[0, 2, 6], [1, 5], [3, 8], [4, 7]]


def test_orientations_may_share_a_bucket() -> None:
    specs = [WeightSpec(16, 32, 4), WeightSpec(32, 16, 4), WeightSpec(32, 16, 0)]
    assert plan_buckets(specs, BucketLimits(one_orientation=False)) == [[0, 1], [2]]


def test_ranks_share_a_bucket() -> None:
    assert plan_buckets([WeightSpec(16, 32, rank) for rank in (4, 7, 16)]) == [[0, 1, 2]]


def test_buckets_come_in_the_order_of_their_first_weights() -> None:
    specs = [
        WeightSpec(32, 16, 4),
        WeightSpec(16, 32, 4),
        WeightSpec(16, 32, 4),
        WeightSpec(32, 16, 4),
        WeightSpec(16, 32, 4),
    ]
    assert plan_buckets(specs, BucketLimits(weights=2)) == [[0, 3], [1, 2], [4]]


@pytest.mark.parametrize("seed", range(10))
def test_every_plan(seed: int) -> None:
    specs = random_specs(seed)
    limits = BucketLimits(weights=5, elements=6000, workspace_bytes=1500)
    plan = plan_buckets(specs, limits)
    assert plan == plan_buckets(list(specs), BucketLimits(5, 6000, 1500))
    assert sorted(i for bucket in plan for i in bucket) == list(range(len(specs)))
    assert [bucket[0] for bucket in plan] == sorted(bucket[0] for bucket in plan)
    for bucket in plan:
        members = [specs[i] for i in bucket]
        assert bucket == sorted(bucket)
        assert len({(s.key, s.rank == 0, s.rows <= s.cols) for s in members}) == 1
        assert len(bucket) <= limits.weights
        if len(bucket) > 1:
            assert sum(s.elements for s in members) <= limits.elements
            assert sum(s.workspace_bytes for s in members) <= limits.workspace_bytes


@pytest.mark.parametrize("seed", range(3))
def test_no_two_neighbouring_buckets_of_a_class_fit_into_one(seed: int) -> None:
    specs = random_specs(seed)
    limits = BucketLimits(weights=5, elements=6000, workspace_bytes=1500)
    classes: dict[object, list[list[WeightSpec]]] = {}
    for indices in plan_buckets(specs, limits):
        members = [specs[i] for i in indices]
        first = members[0]
        classes.setdefault((first.key, first.rank == 0, first.rows <= first.cols), []).append(members)
    for buckets in classes.values():
        for bucket, following in itertools.pairwise(buckets):
            members = [*bucket, following[0]]
            assert (
                len(members) > limits.weights
                or sum(s.elements for s in members) > limits.elements
                or sum(s.workspace_bytes for s in members) > limits.workspace_bytes
            )


def test_drifts_are_bounded() -> None:
    # Rank 384 takes 576 KiB a weight: two of them are more than 1 MiB, and one alone still has its bucket.
    specs = [WeightSpec(2048, 2048, rank) for rank in (384, 384, 256, 256, 256, 768)]
    limits = BucketLimits(drift_bytes=1 << 20)
    assert plan_buckets(specs, limits) == [[0], [1, 2], [3, 4], [5]]


def test_devices_decide_the_limits() -> None:
    """A call of weights on the CPU alone has small buckets of both orientations, any other call those of a GPU."""
    local, summed = (limits_of(["cpu", "cpu"], summed) for summed in (False, True))
    assert not local.one_orientation and not summed.one_orientation
    assert local.drift_bytes < summed.drift_bytes
    for device_types in (["cuda"], ["cpu", "cuda"]):
        for over_processes in (False, True):
            limits = limits_of(device_types, over_processes)
            assert limits.one_orientation and limits.few_elements > 0
            assert plan_buckets([WeightSpec(896, 896, 128)] * 40) == plan_buckets(
                [WeightSpec(896, 896, 128)] * 40, limits
            )


def test_only_intermediates_as_small_as_the_drift_have_one_part() -> None:
    assert intermediate_parts(subtracts_base=True, bfloat16_subspaces=True) == 1
    assert intermediate_parts(subtracts_base=True, bfloat16_subspaces=False) == 3
    assert intermediate_parts(subtracts_base=False, bfloat16_subspaces=True) == 3
