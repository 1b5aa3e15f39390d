from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ranks import run_ranks
from replicated_ranks import (
    FROZEN,
    accumulate_behind_a_gate,
    change_after_wrapping,
    compare_all,
    leave_a_weight_out,
    refusals,
    train,
    verify_one_weight,
)

TOLERANCES = {"float32 bases": 1e-5, "bfloat16 bases": 0.01, "bfloat16 bases, blocks": 0.02}
KINDS: dict[str, dict[str, Any]] = {
    "float32 bases": {},
    "bfloat16 bases": {"basis_dtype": torch.bfloat16},
    "bfloat16 bases, blocks": {"basis_dtype": torch.bfloat16, "keep_base": False},
}
FLOAT32 = {"float32 bases": KINDS["float32 bases"]}
CASES: dict[int, dict[str, dict[str, dict[str, Any]]]] = {
    2: {"llama": FLOAT32, "cut weights": KINDS, "a frozen weight": FLOAT32, "compiled": FLOAT32},
    3: {"llama": KINDS},
    4: {"llama": FLOAT32, "cut weights": FLOAT32, "fewer weights than ranks": FLOAT32},
}


@pytest.mark.parametrize("size", CASES)
def test_equals_the_penalty_of_one_process(size: int) -> None:
    found = run_ranks(size, compare_all, CASES[size])
    for case, kinds in CASES[size].items():
        check(case, kinds, [rank[case] for rank in found])


def check(case: str, kinds: dict[str, dict[str, Any]], found: list[dict[str, Any]]) -> None:
    ranks = [rank["results"] for rank in found]
    for kind, first in ranks[0].items():
        for rank in ranks:
            result = rank[kind]
            assert result["at anchor"] == [0.0, 0.0], (case, kind, result)
            assert result["gradient at anchor"] == 0.0, (case, kind, result)
            ways = [key for key in result if key.startswith(("autograd", "accumulated"))]
            for key in ["penalty", *ways]:
                assert result[key] <= TOLERANCES[kind.rsplit(", ", 1)[0]], (case, kind, key, result)
            message, unchanged = result["refused"]
            assert "averaged over ranks already" in message and unchanged, (case, kind, message)
            # The same bits on every rank.
            assert result["bits"] == first["bits"], (case, kind)
    for kind in kinds:
        check_held(case, [rank["held"][kind] for rank in found])
    if case == "a frozen weight":
        assert FROZEN not in found[0]["gradients"] and "0.weight" in found[0]["gradients"]


def check_held(case: str, held: list[dict[str, Any]]) -> None:
    """Check that ranks together keep every byte of the whole once, and the rows that holders of a cut weight share."""
    size = len(held)
    holders: dict[str, list[int]] = {}
    for rank in held:
        for name, shared in rank["shared"].items():
            holders.setdefault(name, []).append(shared)
    cut = {name: shared for name, shared in holders.items() if len(shared) > 1}
    again = sum(sum(shared[1:]) for shared in cut.values())
    assert sum(rank["here"] for rank in held) == held[0]["whole"] + again
    if case == "fewer weights than ranks":
        assert not cut and [rank["here"] for rank in held].count(0) >= size - 2
        return
    assert cut
    if case != "llama":
        # Two ranks cut the rows of the middle one of an odd number of equal weights; four ranks cut all three.
        assert set(cut) == ({"2.weight"} if size == 2 else {"0.weight", "2.weight", "4.weight"})
    # Measured up to 1.10: what is divided equally is arithmetic, and holders of a cut weight share a basis.
    assert max(rank["here"] for rank in held) < 1.15 * held[0]["whole"] / size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ten_steps_stay_with_one_process(size: int) -> None:
    found = run_ranks(size, train, 10)
    for rank in found:
        for call, (distance, sums) in rank.items():
            assert distance < 1e-3, (call, distance)
            # Replicas stay the same to the last bit.
            assert sums == found[0][call][1]


def test_models_and_anchors_that_do_not_go_together() -> None:
    expected = {
        "divided anchors": "pass the model as it was wrapped",
        "whole blocks": "got the block of a whole weight",
    }
    for rank in run_ranks(3, refusals):
        for case, messages in rank.items():
            assert all(expected[case] in message for message in messages), (case, messages)


def test_anchors_of_one_weight_are_verified_and_loaded(tmp_path: Path) -> None:
    """One rank has all of the work: the others have shards of nothing."""
    for before, after in [
        (found[:3], found[3:]) for found in run_ranks(2, verify_one_weight, str(tmp_path / "anchors"))
    ]:
        assert before == ["accepted"] * 3
        assert all("got other values" in message for message in after)


@pytest.mark.parametrize("side", [False, True], ids=["all anchored weights gated", "one is not"])
def test_gradients_of_zeros_hide_no_averaging(side: bool) -> None:
    """A gate that is zero makes the smallest gradients zeros, on every rank, averaged or not."""
    for after, *before in run_ranks(2, accumulate_behind_a_gate, side):
        assert "averaged over ranks already" in after[0] and after[1]
        assert before == [("accepted", True)] * 2


@pytest.mark.parametrize("option", ["find_unused_parameters", "static_graph"])
def test_shares_that_may_not_be_averaged_are_refused(option: str) -> None:
    """DDP leaves the gradient of a weight that no rank's forward pass uses as it is on each rank."""
    for found in run_ranks(2, leave_a_weight_out, {option: True}):
        for way in ("before", "between"):
            if way in found:
                message, error = found[way]
                assert option in message and error is None, (way, message, error)
        (served,) = found.keys() - {"before", "between"}
        message, error = found[served]
        assert message == "accepted" and error < 1e-5, (served, message, error)


def test_a_parameter_that_has_come_since_is_no_replica() -> None:
    for calls in run_ranks(2, change_after_wrapping, "replaced"):
        assert all(message == "accepted" and error < 1e-5 for message, error in calls), calls


def test_a_parameter_that_was_frozen_when_the_model_was_wrapped_is_refused() -> None:
    for calls in run_ranks(2, change_after_wrapping, "unfrozen"):
        assert all("require grad" in message and error is None for message, error in calls), calls
