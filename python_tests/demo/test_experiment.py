from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import rpsft_kernels as rk
from rpsft_kernels.demo import experiment
from rpsft_kernels.demo.batch import Example
from rpsft_kernels.demo.experiment import Arm, Comparison, choose_measured_steps, compare
from rpsft_kernels.demo.knowledge import Fact, Knowledge, encode_knowledge
from rpsft_kernels.demo.train import Settings, copy_parameters

TRAINING = [Example((i, i + 1, 7), (2 * i + 3, 5)) for i in range(32)]
HELD_OUT = [Example((i, i + 1, 7), (2 * i + 3, 5)) for i in range(32, 40)]
SETTINGS = Settings(steps=8, batch=4, lr=1e-2)


@pytest.fixture
def knowledge(tokenizer: Any) -> Knowledge:
    return encode_knowledge(tokenizer, [Fact("ab", tuple("cdef")), Fact("xyz", tuple("uvwx"))], ["A dog.", "Cats!"])


def compared(
    model: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge, coeff: float, control: rk.Anchors | None = None
) -> Comparison:
    arms = [Arm("SFT", anchors, None), Arm("RPSFT", anchors, coeff)]
    if control is not None:
        arms.append(Arm("random", control, coeff))
    return compare(model, arms, TRAINING, HELD_OUT, knowledge, SETTINGS)


def test_all_runs_start_from_the_same_weights(tiny: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge) -> None:
    control = rk.Anchors.from_model(tiny, 8, subspace="random", progress=False)
    result = compared(tiny, anchors, knowledge, 30.0, control)
    assert (result.before.step, result.before.penalty, result.before.drift) == (0, 0, 0)
    assert result.before.knowledge.divergence == 0
    courses = result.courses
    assert list(courses) == ["SFT", "RPSFT", "random"]
    assert len({course.run.losses[0] for course in courses.values()}) == 1
    assert len({course.run.losses[-1] for course in courses.values()}) == 3
    for course in courses.values():
        assert course.states[0] is result.before
        assert [state.step for state in course.states] == [0, 4, 8]
        assert course.end.task.loss < result.before.task.loss
        assert course.end.drift > 0 and course.end.knowledge.divergence > 0
    assert courses["RPSFT"].end.penalty < courses["SFT"].end.penalty
    # The control's R is that of its own subspaces, which its penalty holds too.
    assert courses["random"].end.penalty < courses["SFT"].end.penalty
    assert courses["SFT"].run.penalties == [] and courses["random"].run.penalties[0] == 0


def test_without_a_coefficient_both_runs_are_one(
    tiny: PreTrainedModel, anchors: rk.Anchors, knowledge: Knowledge
) -> None:
    result = compared(tiny, anchors, knowledge, 0.0)
    assert result.courses["SFT"].states == result.courses["RPSFT"].states


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


@pytest.mark.parametrize(("steps", "expected"), [(1, {1}), (2, {1, 2}), (3, {2, 3}), (32, {16, 32})])
def test_measurements_are_spread_and_reach_the_end(steps: int, expected: set[int]) -> None:
    assert choose_measured_steps(steps) == expected
