from __future__ import annotations

from typing import Any

import pytest
import torch

from ranks import TORCH, needs_fsdp2, run_ranks
from tensor_parallel_ranks import SETTINGS, compare, refused, train

TOLERANCES = {"float32 bases": 1e-5, "bfloat16 bases": 0.01, "bfloat16 bases, blocks": 0.02}
KINDS: dict[str, dict[str, Any]] = {
    "float32 bases": {},
    "bfloat16 bases": {"basis_dtype": torch.bfloat16},
    "bfloat16 bases, blocks": {"basis_dtype": torch.bfloat16, "keep_base": False},
}


needs_uneven = pytest.mark.skipif(
    TORCH < (2, 10),
    reason="full_tensor of torch before 2.10, which shows the gradients, mixes rows of uneven shards up",
)


def cases(*names: str) -> list[Any]:
    """Name the cases, with the torch that each requires."""
    needs = {"llama under FSDP2": [needs_fsdp2], "uneven llama under FSDP2": [needs_fsdp2, needs_uneven]}
    return [pytest.param(name, marks=needs.get(name, ())) for name in names]


@pytest.mark.parametrize("case", cases(*SETTINGS))
def test_equals_the_unsharded_penalty(case: str) -> None:
    found = run_ranks(SETTINGS[case].size, compare, case, KINDS)
    check_cuts(case, found[0]["cuts"])
    ranks = [rank["results"] for rank in found]
    for kind, first in ranks[0].items():
        for rank in ranks:
            result = rank[kind]
            assert result["at anchor"] == [0.0, 0.0], (kind, result)
            assert result["gradient at anchor"] == 0.0, (kind, result)
            for key in ("penalty", "autograd", "accumulated", "added"):
                assert result[key] <= TOLERANCES[kind.rsplit(", ", 1)[0]], (kind, key, result)
            # The same bits on every rank.
            assert result["bits"] == first["bits"], kind
    if case == "uneven layers":
        assert [rank["float32 bases, anchored wrapped"]["empty"] for rank in ranks] == [False, False, True]


def check_cuts(case: str, cuts: dict[str, int]) -> None:
    """Check that as many mesh dimensions cut each matrix as the case's name says."""
    plain = {name for name, count in cuts.items() if not count}
    if "FSDP2" in case:
        assert not plain
        assert {name for name, count in cuts.items() if count == 1} == {"model.embed_tokens.weight"}
        assert set(cuts.values()) == {1, 2}
    else:
        assert plain == {"8.weight" if case == "uneven layers" else "model.embed_tokens.weight"}
        assert set(cuts.values()) == {0, 1}


@pytest.mark.parametrize("case", cases("llama", "uneven layers", "llama under FSDP2"))
def test_ten_steps_stay_with_the_unsharded_run(case: str) -> None:
    for distances in run_ranks(SETTINGS[case].size, train, case, 10):
        assert max(distances.values()) < 1e-3, distances


@needs_fsdp2
@pytest.mark.parametrize("culprit", [0, 3])
def test_what_one_rank_refuses_all_refuse(culprit: int) -> None:
    for rank, (message, changed) in enumerate(run_ranks(4, refused, "llama under FSDP2", culprit)):
        assert ("redistribute the gradient" if rank == culprit else "refused this call") in message, (rank, message)
        assert not changed
