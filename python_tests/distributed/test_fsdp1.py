from __future__ import annotations

from typing import Any

import pytest
import torch

from fsdp1_ranks import compare, pretrained, train
from llama import whole_anchors
from ranks import TORCH, run_ranks

CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "two ranks": (2, {}),
    "three ranks": (3, {}),
    "four ranks": (4, {}),
    "flat, two ranks": (2, {"use_orig_params": False}),
    "flat, three ranks": (3, {"use_orig_params": False}),
    "flat, four ranks": (4, {"use_orig_params": False}),
    "kept after forward": (3, {"strategy": "SHARD_GRAD_OP"}),
    "flat, kept after forward": (3, {"strategy": "SHARD_GRAD_OP", "use_orig_params": False}),
    "replicas of shards": (4, {"strategy": "HYBRID_SHARD"}),
    "flat, replicas of shards": (4, {"strategy": "HYBRID_SHARD", "use_orig_params": False}),
    "whole on every rank": (2, {"strategy": "NO_SHARD"}),
    "flat, whole on every rank": (2, {"strategy": "NO_SHARD", "use_orig_params": False}),
}
FROZEN: dict[str, tuple[int, dict[str, Any]]] = {
    "two weights": (3, {"frozen": ("model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj")}),
    # Without its own parameters FSDP1 wants all of a unit frozen or none.
    "a layer": (3, {"frozen": ("model.layers.1.",), "use_orig_params": False}),
}


def cases(*names: str) -> list[Any]:
    """Name the cases, with the torch that each requires."""
    refused = pytest.mark.skipif(
        TORCH < (2, 9),
        reason="FSDP1 of torch before 2.9 takes no new gradient where it keeps parameters and shards none",
    )
    return [pytest.param(name, marks=refused if name == "whole on every rank" else ()) for name in names]


@pytest.mark.parametrize("case", cases(*CASES))
def test_equals_the_unsharded_penalty(case: str) -> None:
    size, options = CASES[case]
    check(run_ranks(size, compare_case, True, {}, options), 1e-5, options)


@pytest.mark.parametrize("case", cases("three ranks", "flat, three ranks", "replicas of shards", "whole on every rank"))
def test_takes_anchors_of_the_unsharded_model(case: str) -> None:
    size, options = CASES[case]
    check(run_ranks(size, compare_case, False, {}, options), 1e-5, options)


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_parameters_count_and_get_no_gradient(case: str) -> None:
    size, options = FROZEN[case]
    results = run_ranks(size, compare_case, True, {}, options)
    check(results, 1e-5, options)
    for result in results:
        assert result["with gradient"]
        assert not [name for name in result["with gradient"] if name.startswith(options["frozen"])]


@pytest.mark.parametrize(("form", "tolerance"), [("base", 0.01), ("block", 0.02)])
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_bfloat16_bases(form: str, tolerance: float, use_orig_params: bool) -> None:
    anchor_options = {"keep_base": form == "base", "basis_dtype": torch.bfloat16}
    options = {"use_orig_params": use_orig_params}
    check(run_ranks(3, compare_case, True, anchor_options, options), tolerance, options)


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_gradients_kept_in_bfloat16(use_orig_params: bool) -> None:
    # FSDP1 itself cannot do it with parameters of their own that are tied.
    options = {"low_precision": True, "use_orig_params": use_orig_params, "tied": not use_orig_params}
    check(run_ranks(3, compare_case, True, {}, options), 2**-8, options)


def compare_case(sharded_anchors: bool, anchor_options: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return compare(sharded_anchors, anchor_options, **options)


def check(results: list[dict[str, Any]], tolerance: float, options: dict[str, Any]) -> None:
    # Tied embeddings once, under their first name.
    names = sorted(whole_anchors(pretrained(options.get("tied", True))))
    assert "model.embed_tokens.weight" in names and ("lm_head.weight" in names) == (not options.get("tied", True))
    for result in results:
        assert result["names"] == names
        assert set(result["at anchor"]) == {0.0}
        assert "got other values" in result["other values"]
        assert "flat shard" in result["autograd"]
        if options.get("strategy") != "NO_SHARD":
            assert "after the backward pass" in result["gathered"]
        if options.get("strategy") == "SHARD_GRAD_OP" and options.get("use_orig_params", True):
            assert "after the backward pass" in result["before backward"]
        assert "steps within the backward pass" in result["stepped within"]
        for key in ("new", "twice", "added", "penalty"):
            assert result[key] <= tolerance, (key, result)
        assert not result["others changed"]
        # The same bits on every rank.
        assert result["bits"] == results[0]["bits"]


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(("size", "strategy"), [(2, "FULL_SHARD"), (3, "SHARD_GRAD_OP"), (4, "HYBRID_SHARD")])
def test_ten_steps_stay_with_the_unsharded_run(size: int, strategy: str, use_orig_params: bool) -> None:
    options = {"strategy": strategy, "use_orig_params": use_orig_params}
    assert max(run_ranks(size, train_case, options)) < 1e-3


def train_case(options: dict[str, Any]) -> float:
    return train(10, **options)
