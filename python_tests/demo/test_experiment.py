from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import rpsft_kernels as rk
from rpsft_kernels.demo import experiment
from rpsft_kernels.demo.batch import Example
from rpsft_kernels.demo.experiment import Comparison, choose_measured_steps, compare
from rpsft_kernels.demo.knowledge import Fact, Knowledge, encode_knowledge
from rpsft_kernels.demo.train import Settings, copy_parameters

TRAINING = [Example((i, i + 1, 7), (2 * i + 3, 5)) for i in range(32)]
HELD_OUT = [Example((i, i + 1, 7), (2 * i + 3, 5)) for i in range(32, 40)]
SETTINGS = Settings(steps=8, batch=4, lr=1e-2)


@pytest.fixture
def knowledge(tokenizer: Any) -> Knowledge:
    return encode_knowledge(tokenizer, [Fact("ab", tuple("cdef")), Fact("xyz", tuple("uvwx"))], ["A dog.", "Cats!"])


def compared(model: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge, coeff: float) -> Comparison:
    return compare(model, anchors, TRAINING, HELD_OUT, knowledge, SETTINGS, coeff)


def test_both_runs_start_from_the_same_weights(
    tiny: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge
) -> None:
    result = compared(tiny, anchors, knowledge, 30.0)
    assert (result.before.step, result.before.penalty, result.before.drift) == (0, 0, 0)
    assert result.sft.run.losses[0] == result.rpsft.run.losses[0]
    assert result.sft.run.losses[-1] != result.rpsft.run.losses[-1]
    for course in (result.sft, result.rpsft):
        assert course.states[0] is result.before
        assert [state.step for state in course.states] == [0, 2, 4, 6, 8]
        assert course.end.task.loss < result.before.task.loss
        assert course.end.drift > 0
    assert result.rpsft.end.penalty < result.sft.end.penalty


def test_without_a_coefficient_both_runs_are_one(
    tiny: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge
) -> None:
    result = compared(tiny, anchors, knowledge, 0.0)
    assert result.sft.states == result.rpsft.states


def test_the_model_ends_as_it_began(tiny: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge) -> None:
    before = copy_parameters(tiny)
    compared(tiny, anchors, knowledge, 1.0)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in tiny.named_parameters())


def test_the_model_is_restored_after_a_failure(
    tiny: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copy_parameters(tiny)
    scored = 0

    def fails_later(*arguments: object) -> Any:
        nonlocal scored
        scored += 1
        if scored > 2:
            raise RuntimeError("out of memory")
        return None

    monkeypatch.setattr(experiment, "score_task", fails_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        compared(tiny, anchors, knowledge, 1.0)
    assert all(torch.equal(p, before[name]) for name, p in tiny.named_parameters())


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, {1}), (2, {1, 2}), (4, {1, 2, 3, 4}), (48, {12, 24, 36, 48}), (50, {12, 25, 38, 50})]
)
def test_measurements_are_spread_and_reach_the_end(steps: int, expected: set[int]) -> None:
    assert choose_measured_steps(steps) == expected
