from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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


class Engine(nn.Sequential):
    """Of DeepSpeed's engine what an attached penalty asks for."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8))
        self.optimizer = SimpleNamespace(overflow=False)

    def gradient_accumulation_steps(self) -> int:
        return 2

    def zero_optimization_stage(self) -> int:
        return 1


def test_a_step_that_the_engine_skips_does_not_count() -> None:
    from rpsft_kernels.integrations.accelerate import _attach_to_deepspeed

    overflows, engine = iter([True, False, True, False]), Engine()
    accelerator = SimpleNamespace(sync_gradients=True)

    def backward(loss: Tensor) -> None:
        loss.backward()
        if accelerator.sync_gradients:
            # It has stepped, or not.
            engine.optimizer.overflow = next(overflows)

    accelerator.backward = backward
    penalty = rk.RotationPenalty(4, coeff=lambda step: 3.0 + step).anchor(engine)
    _attach_to_deepspeed(accelerator, penalty, engine)  # type: ignore[arg-type]
    counted = []
    for number in range(8):
        accelerator.sync_gradients = number % 2 == 1
        accelerator.backward(engine(torch.ones(1, 8)).sum())
        counted.append(penalty.step)
    assert counted == [0, 0, 0, 1, 1, 1, 1, 2]
    assert penalty.metrics()["rotation/coeff"] == 4.0
