from __future__ import annotations

from typing import Any

import pytest
import torch

from fsdp2_ranks import compare, train
from ranks import needs_fsdp2, run_ranks

pytestmark = needs_fsdp2
FLOAT32: dict[str, Any] = {}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "rows": (2, {}),
    "rows, three ranks": (3, {}),
    "rows, four ranks": (4, {}),
    "columns": (3, {"dim": 1}),
    "kept whole after forward": (2, {"reshard": False}),
    "mixed precision": (2, {"mixed": True}),
    "replicas of shards": (4, {"mesh_shape": (2, 2)}),
    "compiled blocks": (2, {"compiled": True}),
    "activation checkpointing": (2, {"checkpointed": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sharded_anchors", [True, False], ids=["anchored sharded", "anchored whole"])
def test_equals_the_unsharded_penalty(case: str, sharded_anchors: bool) -> None:
    size, options = CASES[case]
    results = run_ranks(size, compare_case, sharded_anchors, torch.float32, {}, options)
    check(results, 1e-5)


@pytest.mark.parametrize(("form", "tolerance"), [("base", 0.01), ("block", 0.02)])
def test_bfloat16_bases(form: str, tolerance: float) -> None:
    options = {"keep_base": form == "base", "basis_dtype": torch.bfloat16}
    check(run_ranks(3, compare_case, True, torch.float32, options, {}), tolerance)


def test_bfloat16_weights() -> None:
    check(run_ranks(3, compare_case, True, torch.bfloat16, {"basis_dtype": torch.bfloat16}, {}), 0.01)


def compare_case(
    sharded_anchors: bool, dtype: torch.dtype, anchor_options: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    return compare(sharded_anchors, dtype, anchor_options, **options)


def check(results: list[dict[str, Any]], tolerance: float) -> None:
    for result in results:
        assert result["at anchor"] == 0.0
        assert result["verified"]
        for key in ("autograd", "accumulated", "twice", "penalty"):
            assert result[key] <= tolerance, (key, result)
        # The same bits on every rank.
        assert result["bits"] == results[0]["bits"]


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(("size", "options"), [(2, {}), (3, {"dim": 1}), (4, {"mesh_shape": (2, 2)})])
def test_ten_steps_stay_with_the_unsharded_run(size: int, options: dict[str, Any], accumulate: bool) -> None:
    assert max(run_ranks(size, train_case, accumulate, options)) < 1e-3


def train_case(accumulate: bool, options: dict[str, Any]) -> float:
    return train(10, accumulate, **options)
