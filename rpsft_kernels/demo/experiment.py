"""The comparison: one model, fine-tuned twice from the same weights on the same examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..anchors.anchor import Anchor
from ..penalty import rotation_penalty
from .batch import Example
from .knowledge import Knowledge, KnowledgeScore, score_knowledge
from .task import TaskScore, score_task
from .train import Run, Settings, copy_parameters, fine_tune, relative_drift, restore_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Each costs a few seconds on two cores; with the one before training, they are the points of the curves.
_MEASUREMENTS = 4


@dataclass(frozen=True)
class State:
    """Everything that is measured of a model after ``step`` optimizer steps.

    Attributes:
        step: 0 is the pretrained model.
        penalty: R.
        drift: ``||W - W0|| / ||W0||``.
    """

    step: int
    task: TaskScore
    knowledge: KnowledgeScore
    penalty: float
    drift: float


@dataclass(frozen=True)
class Course:
    """One run: what was recorded at each step, and the states that were measured on the way; the last is the end."""

    run: Run
    states: list[State] = field(default_factory=list)

    @property
    def end(self) -> State:
        return self.states[-1]


@dataclass(frozen=True)
class Comparison:
    """The pretrained model, plain fine-tuning (``sft``) and fine-tuning with the penalty (``rpsft``)."""

    before: State
    sft: Course
    rpsft: Course


def compare(
    model: PreTrainedModel,
    anchors: Mapping[str, Anchor],
    training: Sequence[Example],
    held_out: Sequence[Example],
    knowledge: Knowledge,
    settings: Settings,
    coeff: float,
) -> Comparison:
    """Fine-tune ``model`` without and then with the penalty; it ends with its pretrained weights.

    Args:
        model: The pretrained model, on the device to train on.
        anchors: Of its present weights, on the same device.
        training: ``steps * batch`` examples, in the order of training.
        held_out: Examples that the task is scored on.
        knowledge: What must not be forgotten.
        settings: Of both runs.
        coeff: The paper's lambda, in the second run.
    """
    saved = copy_parameters(model)

    def measure(step: int) -> State:
        with torch.no_grad():
            penalty = rotation_penalty(model, anchors).item()
        task, known = score_task(model, held_out), score_knowledge(model, knowledge)
        return State(step, task, known, penalty, relative_drift(model, saved))

    before = measure(0)
    courses = []
    wanted = measured_steps(settings.steps)
    for label, applied in (("SFT", None), ("RPSFT", coeff)):
        states = [before]

        def after_step(done: int, states: list[State] = states) -> None:
            if done in wanted:
                states.append(measure(done))

        try:
            run = fine_tune(model, anchors, training, settings, applied, label, after_step)
        finally:
            restore_parameters(model, saved)
        courses.append(Course(run, states))
    return Comparison(before, *courses)


def measured_steps(steps: int) -> set[int]:
    """After which steps the model is measured: evenly spread, the last one among them."""
    return {max(1, round(steps * i / _MEASUREMENTS)) for i in range(1, _MEASUREMENTS + 1)}
