"""The comparison: one model, fine-tuned several times from the same weights on the same examples, in one arm each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from ..anchors.anchor import Anchor
from ..penalty import rotation_penalty
from .batch import Example
from .knowledge import Knowledge, KnowledgeScore, predict_prose, score_knowledge
from .task import TaskScore, score_task
from .train import Settings, TrainingRun, copy_parameters, fine_tune, relative_drift, restore_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# States measured in each run: with the one before training, the points of the curves. Each costs as much as three
# steps.
_MEASUREMENTS = 2


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        name: For tables and curves.
        anchors: The anchors that R is measured with.
        coeff: The paper's lambda; None trains without the penalty.
    """

    name: str
    anchors: Mapping[str, Anchor]
    coeff: float | None


@dataclass(frozen=True)
class State:
    """The measurements of a model after ``step`` optimizer steps.

    Attributes:
        step: 0 is the pretrained model.
        penalty: R with the arm's anchors.
        drift: ``||W - W0|| / ||W0||``.
    """

    step: int
    task: TaskScore
    knowledge: KnowledgeScore
    penalty: float
    drift: float


@dataclass(frozen=True)
class Course:
    """One run: its record of each step, and the states that were measured on the way; the last is the end."""

    run: TrainingRun
    states: list[State] = field(default_factory=list)

    @property
    def end(self) -> State:
        return self.states[-1]


@dataclass(frozen=True)
class Comparison:
    """The pretrained model, and a course of each arm by its name, in the order of training."""

    before: State
    courses: Mapping[str, Course]


def compare(
    model: PreTrainedModel,
    arms: Sequence[Arm],
    training: Sequence[Example],
    held_out: Sequence[Example],
    knowledge: Knowledge,
    settings: Settings,
) -> Comparison:
    """Fine-tune ``model`` in one arm after the other; it ends with its pretrained weights.

    Args:
        model: The pretrained model, on the device to train on.
        arms: At least one, with different names; their anchors are those of the present weights, on the same device.
        training: ``steps * batch`` examples, in the order of training.
        held_out: Examples that the task is scored on.
        knowledge: Facts and prose that must not be forgotten.
        settings: The settings of all runs.
    """
    saved = copy_parameters(model)
    pretrained = [predicted for predicted, _ in predict_prose(model, knowledge.prose)]

    def measure(step: int, anchors: Mapping[str, Anchor]) -> State:
        with torch.no_grad():
            penalty = rotation_penalty(model, anchors).item()
        task, known = score_task(model, held_out), score_knowledge(model, knowledge, pretrained)
        return State(step, task, known, penalty, relative_drift(model, saved))

    before = measure(0, arms[0].anchors)
    courses = {}
    steps_to_measure = choose_measured_steps(settings.steps)
    for arm in arms:
        states = [before]

        def after_step(done: int, states: list[State] = states, arm: Arm = arm) -> None:
            if done in steps_to_measure:
                states.append(measure(done, arm.anchors))

        try:
            run = fine_tune(model, arm.anchors, training, settings, arm.coeff, label=arm.name, after_step=after_step)
        finally:
            restore_parameters(model, saved)
        courses[arm.name] = Course(run, states)
    return Comparison(before, courses)


def choose_measured_steps(steps: int) -> set[int]:
    """Choose the steps after which the model is measured: evenly spread, the last one among them."""
    return {max(1, round(steps * i / _MEASUREMENTS)) for i in range(1, _MEASUREMENTS + 1)}
