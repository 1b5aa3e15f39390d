"""Ranks that call from_model differently all raise, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from disagreeing_ranks import anchor_differently, anchor_differently_in_two_groups
from ranks import run_ranks

ODD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"rank": 4}, "rank: got 8 on rank 0, 4 on rank 1, expected the same on every rank"),
    "basis_dtype": (
        {"basis_dtype": torch.float32},
        "basis_dtype: got torch.bfloat16 on rank 0, torch.float32 on rank 1",
    ),
    "keep_base": ({"keep_base": False}, "keep_base: got True on rank 0, False on rank 1"),
    "share of energy": ({"rank": 0.5}, "rank: got 8 on rank 0, 0.5 on rank 1"),
    "subspace": ({"subspace": "random"}, "subspace: got singular on rank 0, random on rank 1"),
    "exclude": ({"exclude": "1.*"}, "model: got other parameters to anchor on other ranks"),
}


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.parametrize("argument", ODD_ARGUMENTS)
def test_other_arguments_on_one_rank_are_refused_on_all(argument: str, wrapper: str) -> None:
    odd, expected = ODD_ARGUMENTS[argument]
    for message, count in run_ranks(2, anchor_differently, wrapper, odd):
        assert expected in message and count == 3


def test_ranks_of_other_groups_learn_of_a_disagreement() -> None:
    found = run_ranks(4, anchor_differently_in_two_groups)
    assert [second for _, second, _ in found] == ["accepted"] * 4
    assert all("rank: got " in first for first, _, _ in found[1:])
    assert all("no anchor was made: rank 3: 2.weight: weight: got NaN" in third for *_, third in found[:3])
    assert found[3][2].startswith("2.weight: weight: got NaN")
    assert "another rank refused this call" in found[0][0]
