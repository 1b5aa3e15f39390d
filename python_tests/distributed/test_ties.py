"""Ties that sharding, or one rank, has undone are refused on every rank. In one process: python_tests/anchors."""

from __future__ import annotations

from ranks import needs_fsdp2, run_ranks
from ties_ranks import shard_apart, untie_on_one_rank

UNTIED = "1.weight: got a parameter of its own, anchored as one with 0.weight"


@needs_fsdp2
def test_embedding_and_head_sharded_apart() -> None:
    for messages in run_ranks(2, shard_apart):
        assert all(UNTIED in message for message in messages), messages


def test_a_head_untied_on_one_rank() -> None:
    own, other = run_ranks(2, untie_on_one_rank)[::-1]
    assert all(UNTIED in message for message in own), own
    assert all("rank 1" in message for message in other), other
