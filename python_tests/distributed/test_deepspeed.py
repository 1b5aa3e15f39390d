from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from deepspeed_ranks import (
    masters,
    masters_in_another_order,
    masters_of_partitions,
    masters_of_replicas,
    odd_partitions,
    partitioned,
    replicated,
    train,
    unpartitioned,
)
from llama import llama, whole_anchors
from ranks import run_ranks

# Looked for, not imported: that takes seconds, and belongs to the ranks.
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-deepspeed does it"
)

PARTITIONED: dict[str, tuple[int, bool, dict[str, Any], float]] = {
    "two ranks": (2, True, {}, 1e-5),
    "three ranks": (3, True, {}, 1e-5),
    "one rank": (1, True, {}, 1e-5),
    "anchored whole": (3, False, {}, 1e-5),
    "frozen layer": (2, True, {"frozen": "model.layers.1."}, 1e-5),
    "optimizer on the CPU": (2, True, {"offload": True}, 1e-5),
    "loss scale": (2, True, {"loss_scale": 128.0}, 1e-5),
    # Without a task, so that no other gradient is rounded to bfloat16.
    "bfloat16, two ranks": (2, True, {"bfloat16": True, "task": 0.0}, 0.01),
    "bfloat16, three ranks": (3, True, {"bfloat16": True, "task": 0.0}, 0.01),
    "bfloat16, gradients in float32": (2, True, {"bfloat16": True, "gradient_dtype": "fp32"}, 1e-4),
}


@pytest.mark.parametrize("case", PARTITIONED)
def test_zero3_equals_the_unsharded_penalty(case: str) -> None:
    size, sharded_anchors, options, tolerance = PARTITIONED[case]
    check_partitioned(run_ranks(size, partitioned_case, sharded_anchors, {}, options), sharded_anchors, tolerance)


@pytest.mark.parametrize(("form", "tolerance"), [("base", 0.01), ("block", 0.02)])
def test_zero3_with_bfloat16_bases(form: str, tolerance: float) -> None:
    anchor_options = {"keep_base": form == "base", "basis_dtype": torch.bfloat16}
    check_partitioned(run_ranks(3, partitioned_case, True, anchor_options, {}), True, tolerance)


def partitioned_case(sharded_anchors: bool, anchor_options: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return partitioned(sharded_anchors, anchor_options, **options)


def check_partitioned(results: list[dict[str, Any]], sharded_anchors: bool, tolerance: float) -> None:
    for result in results:
        # Tied embeddings once, under their first name.
        assert result["names"] == list(whole_anchors(llama()))
        assert "flat shard" in result["autograd"]
        assert "engine.backward" in result["before backward"]
        assert result["at anchor"] == [0.0, 0.0]
        assert result["changed at anchor"] == []
        for key in ("added", "twice", "penalty"):
            assert result[key] <= tolerance, (key, result)
        if sharded_anchors:
            assert "got other values" in result["other values"]
        # The same bits on every rank.
        assert result["bits"] == results[0]["bits"]


@pytest.mark.parametrize("size", [2, 3])
def test_zero3_partitions_with_padding_and_without_gradients(size: int) -> None:
    results = run_ranks(size, odd_partitions, 3)
    for result in results:
        assert max(result["errors"]) <= 1e-5, result
    assert sum(result["held"]["first.weight"] for result in results) == 77
    if size == 3:
        assert [result["held"]["small.weight"] for result in results] == [2, 2, 0]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("size", "bfloat16", "tolerance"), [(2, False, 1e-5), (3, False, 1e-5), (2, True, 0.01)])
def test_penalty_in_the_loss_of_replicas(stage: int, size: int, bfloat16: bool, tolerance: float) -> None:
    check_replicated(run_ranks(size, replicated, stage, {}, bfloat16), tolerance)


def test_block_form_of_replicas() -> None:
    anchor_options = {"keep_base": False, "basis_dtype": torch.bfloat16}
    check_replicated(run_ranks(2, replicated, 2, anchor_options), 0.02)


def check_replicated(results: list[dict[str, Any]], tolerance: float) -> None:
    whole = results[0]["whole bytes"]
    # Cut weights have the other side's basis on both ranks.
    assert whole <= sum(result["bytes"] for result in results) <= 1.2 * whole
    for result in results:
        assert result["names"] == list(whole_anchors(llama()))
        assert abs(result["bytes"] / whole * len(results) - 1) < 0.25
        assert set(result["at anchor"]) == {0.0}
        assert "keeps to itself" in result["accumulate"] and "rotation_penalty" in result["accumulate"]
        assert "got other values" in result["other values"]
        for key in ("penalty", "gradient, penalty first", "gradient, penalty last", "gradient, penalty alone"):
            assert result[key] <= tolerance, (key, result)
        assert result["bits"] == results[0]["bits"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_are_reached_through_deepspeeds_functions(stage: int) -> None:
    for result in run_ranks(2, masters, stage):
        # Gradients of stage 1 are bfloat16.
        assert result["penalty"] <= 1e-4 and result["gradient"] <= (0.01 if stage == 1 else 1e-5)
        if stage < 3:
            # Where the masters that were written here have crossed a rounding step, the model's weights count.
            assert 0.9 <= result["engine"] <= 1 and result["warnings"] == []
            continue
        assert result["engine"] == 0, "no weight in bfloat16 has moved"
        (message,) = result["warnings"]
        assert "are copies of masters which DeepSpeed's optimizer keeps" in message


@pytest.mark.parametrize(
    ("size", "stage", "gradient_dtype"),
    # With float32 gradients stage 1 has another optimizer.
    [(2, 1, None), (2, 2, None), (2, 1, "fp32"), (1, 2, None)],
)
def test_replicas_are_computed_at_the_masters(
    size: int, stage: int, gradient_dtype: str | None, tmp_path: Path
) -> None:
    results = run_ranks(size, masters_of_replicas, stage, gradient_dtype, str(tmp_path))
    whole = results[0]["whole bytes"]
    # Cut weights have the other side's basis on both ranks.
    assert whole <= sum(result["bytes"] for result in results) <= 1.2 * whole
    for result in results:
        assert abs(result["bytes"] / whole * size - 1) < 0.25
        assert set(result["at anchor"].values()) == {0.0}
        # Blocks are of copies.
        assert {form: len(messages) for form, messages in result["warnings"].items()} == {
            "made of the engine": 0,
            "whole": 0,
            "block": 1,
        }
        for form in ("made of the engine", "whole"):
            found = result[form]
            assert found["penalty"] <= 1e-5 and found["penalty of copies"] > 0.5, (form, result)
            # Rounded once to bfloat16.
            assert found["gradient"] <= 2.0**-8, (form, result)
            assert found["R"] == results[0][form]["R"]
        assert abs(result["written"]) <= 1e-5
        assert set(result["resumed"].values()) == {True}, result


def test_masters_are_found_where_the_parameters_lie() -> None:
    assert max(run_ranks(2, masters_in_another_order)) <= 1e-5


@pytest.mark.parametrize("offload", [False, True])
def test_zero3_is_computed_at_the_masters(offload: bool) -> None:
    results = run_ranks(2, masters_of_partitions, offload)
    for result in results:
        assert set(result["at anchor"].values()) == {0.0}
        warned = {form: len(messages) for form, messages in result["warnings"].items()}
        # Those of an offloaded optimizer are not at hand; blocks and a W0 that is to be rounded are of copies.
        assert warned == {"base": int(offload), "block": 1, "unrounded": 1}
        assert all("are copies of masters" in message for each in result["warnings"].values() for message in each)
        if offload:
            assert result["penalty of copies"] <= 1e-5 and result["penalty"] > 0.5 and result["gradient"] > 0.5
        else:
            assert result["penalty"] <= 1e-5 and result["gradient"] <= 1e-5 and result["penalty of copies"] > 0.5
        # The block form goes on at the copies.
        assert abs(result["blocks"]) <= 1e-3
        assert result["R"] == results[0]["R"]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_of_zero0_are_added_to(accumulation: int) -> None:
    results = run_ranks(2, unpartitioned, accumulation)
    for result in results:
        assert result["gradient"] <= 1e-5
        assert "averaged over ranks already" in result["averaged"]
        assert result["moved"] == result["anchored"]
        assert result["bits"] == results[0]["bits"] > 0


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (3, {"stage": 3}),
        (2, {"stage": 3, "accumulation": 2}),
        (2, {"stage": 3, "accumulation": 2, "offload": True}),
        (2, {"stage": 3, "loss_scale": 128.0}),
        (2, {"stage": 1}),
        (3, {"stage": 2}),
        (2, {"stage": 2, "accumulation": 2}),
    ],
    ids=str,
)
def test_ten_steps_stay_with_the_unsharded_run(size: int, options: dict[str, Any]) -> None:
    assert max(run_ranks(size, train_case, options)) < 1e-3


def train_case(options: dict[str, Any]) -> float:
    return train(10, **options)
