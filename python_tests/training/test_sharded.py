"""Training over two ranks: corrections of shards and replicas against float64, budgets, states and files."""

from __future__ import annotations

import math
from typing import Any

import pytest

from ranks import FSDP2_RUNS, run_ranks
from training_ranks import KINDS, correct_and_train

# Bases in float32: what is left is the rounding of the weights, which are 30 times as large as the corrections.
CORRECTION = 1e-4


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    kinds = [kind for kind in KINDS if kind != "fsdp2" or FSDP2_RUNS]
    return run_ranks(2, correct_and_train, kinds, str(tmp_path_factory.mktemp("anchors")))


def test_corrections_are_those_of_one_process(found: list[dict[str, Any]]) -> None:
    for case, result in found[0]["corrections"].items():
        assert len(result["errors"]) >= 2, case
        assert max(result["errors"].values()) < CORRECTION, (case, result)
        assert result["left"] == pytest.approx(result["expected"], rel=1e-3), (case, result)
        assert result["energy"] == pytest.approx(1.0, rel=1e-6), case
        assert result["frozen stays"] and result["others stay"], case
        for value in result["layers"].values():
            assert value == pytest.approx(1.0, rel=1e-4), (case, result["layers"])


def test_all_ranks_end_with_the_same_bits(found: list[dict[str, Any]]) -> None:
    for case, result in found[0]["corrections"].items():
        assert result["bits"] == found[1]["corrections"][case]["bits"], case
    for case, result in found[0]["trained"].items():
        assert result["bits"] == found[1]["trained"][case]["bits"], case


def test_a_budget_has_the_same_coefficient_and_state_on_every_rank(found: list[dict[str, Any]]) -> None:
    for case, result in found[0]["trained"].items():
        assert result["state"] == found[1]["trained"][case]["state"], case
        assert result["state"]["ascent"] is not None, case
        assert 0 < result["metrics"]["rotation/R"], case
        assert result["again"] and found[1]["trained"][case]["again"], case


def test_the_gradient_of_a_step_is_compared_with_that_step_s_penalty(found: list[dict[str, Any]]) -> None:
    for rank in found:
        observed = [result for result in rank["trained"].values() if result["observed"]]
        assert observed
        for result in observed:
            metrics = result["metrics"]
            expected = 2 * metrics["rotation/coeff"] * math.sqrt(metrics["rotation/R"]) / result["observed"]
            assert metrics["rotation/grad_ratio"] == pytest.approx(expected, rel=1e-4)


def test_the_digest_does_not_depend_on_how_weights_lie(found: list[dict[str, Any]]) -> None:
    assert len({result["state"]["anchors"] for result in found[0]["trained"].values()}) == 1


def test_ranks_that_disagree_all_refuse(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert "that ranks [0] see and others do not" in rank["a file that one rank sees"]
        assert "got others on rank" in rank["deviating lr"]["message"]
        assert rank["deviating lr"]["unchanged"]
