"""Second derivatives of R over shards: refused where C is a sum over ranks, right where it is not."""

from __future__ import annotations

from ranks import run_ranks
from second_derivatives_ranks import change_penalty_in_place, differentiate_twice


def test_second_derivatives_over_shards_are_refused_on_every_rank() -> None:
    for message, _, (made, total) in run_ranks(2, differentiate_twice, 3):
        assert "create_graph=True" in message and "W + v" in message
        assert not made and total != 0.0, "a usual backward pass serves on"


def test_second_derivatives_of_full_anchors_over_shards_are_right() -> None:
    for message, distance, _ in run_ranks(2, differentiate_twice, 6):
        assert message == "accepted" and distance < 1e-5


def test_the_penalty_over_shards_may_be_changed_in_place() -> None:
    for in_place, expected in run_ranks(2, change_penalty_in_place):
        assert in_place == expected != 0.0
