from __future__ import annotations

from typing import Any

import pytest

from adapted_ranks import SHARDED, everything
from ranks import needs_fsdp2, run_ranks

pytestmark = needs_fsdp2


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return run_ranks(2, everything)


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_adapters(results: list[dict[str, Any]], name: str) -> None:
    for result in results:
        for key, value in result[name].items():
            if key.endswith("start"):
                assert value == 0.0
            elif key.endswith("bits"):
                assert value == results[0][name][key]
                assert len(set(value)) == 1
            else:
                assert value <= 1e-12, (key, value)


def test_replicated_adapters(results: list[dict[str, Any]]) -> None:
    for result in results:
        for key, value in result["replicated"].items():
            if key.endswith("bits"):
                assert value == results[0]["replicated"][key]
            else:
                # What is left of a difference of gradients that have the task's in them.
                assert value <= 1e-10, (key, value)


def test_what_one_rank_refuses_is_refused_by_all(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results):
        coeff, disabled, health, grads = result["refused"]
        assert "coeff differ" in coeff
        assert ("enable_adapter_layers" if rank else "rank 1 refused this call") in disabled
        assert "NaN or infinity in the drifts of rank 1" in health
        assert grads == "[]"
