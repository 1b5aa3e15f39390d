from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import rpsft_kernels as rk
from deepspeed_framework_ranks import all_of_deepspeed
from ranks import run_ranks
from rpsft_kernels.integrations.deepspeed import check_mode

pytest.importorskip("accelerate")
pytest.importorskip("transformers", minversion="5.24", reason="docs/training.md says what was tested")

# Looked for, not imported: that takes seconds, and belongs to the ranks.
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: make test-deepspeed does it"
)


@needs_deepspeed
def test_what_the_optimizer_receives_under_zero() -> None:
    results: list[dict[str, Any]] = run_ranks(2, all_of_deepspeed)
    for found in results:
        # float32 weights that differ by little tell gradients less exactly than gradients do.
        errors = {name: max(each) for name, each in found.items() if not name.endswith("R")}
        assert len(errors) == 5
        assert {name: error for name, error in errors.items() if not error < 1e-5} == {}
        for name, logged in found.items():
            if name.endswith("R"):
                assert logged[0] > 0.1 > logged[-1] > 0, name


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        (rk.RotationPenalty(8, mode="decoupled"), "mode: got 'decoupled' under DeepSpeed"),
        (rk.RotationPenalty(8, mode="project", budget=0.1), "mode: got 'project' under DeepSpeed"),
        (rk.RotationPenalty(8, budget=0.1), "budget: got one under DeepSpeed, expected coeff"),
    ],
)
def test_what_deepspeed_cannot_have_is_refused(penalty: rk.RotationPenalty, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_mode(penalty)
