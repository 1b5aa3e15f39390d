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
from .train import Settings, TrainingRun, copy_parameters, fine_tune, relative_drift, restore_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# States measured in each run: with the one before training, the points of the curves. Each costs a few seconds on two
# cores.
_MEASUREMENTS = 4


@dataclass(frozen=True)
class State:
    """The measurements of a model after ``step`` optimizer steps.

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
    """One run: its record of each step, and the states that were measured on the way; the last is the end."""

    run: TrainingRun
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
        anchors: The anchors of its present weights, on the same device.
        training: ``steps * batch`` examples, in the order of training.
        held_out: Examples that the task is scored on.
        knowledge: Facts and prose that must not be forgotten.
        settings: The settings of both runs.
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
    steps_to_measure = choose_measured_steps(settings.steps)
    for label, applied in (("SFT", None), ("RPSFT", coeff)):
        states = [before]

        def after_step(done: int, states: list[State] = states) -> None:
            if done in steps_to_measure:
                states.append(measure(done))

        try:
            run = fine_tune(model, anchors, training, settings, coeff=applied, label=label, after_step=after_step)
        finally:
            restore_parameters(model, saved)
        courses.append(Course(run, states))
    return Comparison(before, *courses)


def choose_measured_steps(steps: int) -> set[int]:
    """Choose the steps after which the model is measured: evenly spread, the last one among them."""
    return {max(1, round(steps * i / _MEASUREMENTS)) for i in range(1, _MEASUREMENTS + 1)}
