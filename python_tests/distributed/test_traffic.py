from __future__ import annotations

import pytest

from llama import RANK
from ranks import needs_fsdp2, run_ranks
from traffic_ranks import Traffic, replicated, sharded

# Bytes of one C, so that every weight is a bucket of its own; and of all C.
ONE, ALL = 4 * RANK * RANK, 16 << 20


def scalars(size: int) -> list[tuple[str, int, int]]:
    """The all-reduces by which ranks agree and learn of each other's health."""
    return [("torch.int64", 3 * size + 3, 8 * (3 * size + 3)), ("torch.float32", 1 + size, 4 * (1 + size))]


def check_sums_only(traffic: Traffic, size: int) -> list[tuple[str, int, int]]:
    """Return the sizes of the all-reduces beside the two of scalars."""
    assert set(traffic.called) == {"all_reduce"}
    assert traffic.by_dtensor == 0
    table, *blocks, health = traffic.sizes
    assert [table, health] == scalars(size)
    return blocks


@needs_fsdp2
@pytest.mark.parametrize("drift_bytes", [ONE, ALL], ids=["many buckets", "few buckets"])
@pytest.mark.parametrize("size", [2, 3])
def test_sharded_weights_send_their_blocks_and_nothing_else(size: int, drift_bytes: int) -> None:
    for counted in run_ranks(size, sharded, drift_bytes):
        assert counted.buckets == counted.projected if drift_bytes == ONE else counted.buckets < counted.projected
        for traffic in counted.traffic.values():
            blocks = check_sums_only(traffic, size)
            assert len(blocks) == counted.buckets
            assert sum(elements for _, elements, _ in blocks) == counted.projected * RANK**2
            assert {dtype for dtype, _, _ in blocks} == {"torch.float32"}


def test_replicated_weights_that_are_not_cut_send_scalars_alone() -> None:
    for counted in run_ranks(3, replicated):
        for traffic in counted.traffic.values():
            assert check_sums_only(traffic, 3) == []


@needs_fsdp2
def test_blocks_travel_while_the_next_are_projected() -> None:
    for counted in run_ranks(2, sharded, ONE):
        for traffic in counted.traffic.values():
            assert traffic.events[:2] == ["start table", "finish table"]
            # Each is sent before the next bucket is projected; those that are not summed are projected in between.
            rest = traffic.events[2:]
            waits = rest.index("finish C")
            assert set(rest[waits:]) == {"finish C", "finish scalars"}
            assert rest[:waits].count("start C") == counted.buckets == rest.count("finish C")
            assert rest[waits - 1] == "start scalars"
            for at in [i for i, event in enumerate(rest) if event == "start C"]:
                assert rest[at - 1] == "project"
