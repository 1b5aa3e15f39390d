"""Writes what the demo prints: a table of the measurements, and a conclusion from them in words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .experiment import Comparison, Course, State

_PLAIN, _PENALISED, _CONTROL = "SFT", "RPSFT", "random"
# The ratio of two divergences above which their difference is too small to be compared with another one.
_EFFECT = 0.9


@dataclass(frozen=True)
class Row:
    """A line of the table: its name, and a cell for the pretrained model and for each arm, empty where it has none."""

    name: str
    cells: tuple[str, ...]


def list_rows(comparison: Comparison) -> list[Row]:
    """Write every measurement: before training, and at the end of each arm."""
    courses = list(comparison.courses.values())
    states = [comparison.before, *(course.end for course in courses)]

    def measurement(name: str, form: str, value: Callable[[State], float]) -> Row:
        return Row(name, tuple(form.format(value(state)) for state in states))

    def duration(name: str, value: Callable[[Course], str]) -> Row:
        return Row(name, ("", *map(value, courses)))

    return [
        measurement("task: loss, nats per token", "{:.3f}", lambda s: s.task.loss),
        measurement("task: held-out sums answered right", "{:.1%}", lambda s: s.task.accuracy),
        measurement("elsewhere: KL of English, nats per token", "{:.4f}", lambda s: s.knowledge.divergence),
        measurement("elsewhere: perplexity of English", "{:.2f}", lambda s: s.knowledge.perplexity),
        measurement("elsewhere: facts in chat, loss of true ends", "{:.2f}", lambda s: s.knowledge.fact_loss),
        measurement("elsewhere: facts in chat ranked right", "{:.1%}", lambda s: s.knowledge.facts),
        measurement("penalty R, in the arm's own subspaces", "{:.4g}", lambda s: s.penalty),
        measurement("relative drift of all weights", "{:.2e}", lambda s: s.drift),
        duration("seconds per step (median)", lambda c: f"{c.run.seconds_per_step:.2f}"),
        duration("of which the penalty's", lambda c: _share_of_penalty(c)),
    ]


def _share_of_penalty(course: Course) -> str:
    return f"{course.run.penalty_seconds_per_step:.2f}" if course.run.penalty_seconds else ""


def format_table(comparison: Comparison) -> str:
    """Write the rows as text."""
    names = ["before", *comparison.courses]
    lines = [
        f"{row.name:<46}" + "".join(f"{cell:>10}" for cell in row.cells).rstrip()
        for row in (Row("", tuple(names)), *list_rows(comparison))
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def format_markdown(comparison: Comparison) -> str:
    """Write the rows as a table in Markdown."""
    header = ["", "before", *comparison.courses]
    lines = [header, ["---"] * len(header), *([row.name, *row.cells] for row in list_rows(comparison))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def conclude(comparison: Comparison, held_out: int, facts: int) -> str:
    """Say in words what the measurements show; they decide every word that could be otherwise.

    Args:
        comparison: The measurements.
        held_out: Number of sums that the task was scored on.
        facts: Number of facts that were asked.
    """
    sentences = [_learning(comparison)]
    plain = comparison.courses.get(_PLAIN)
    for name in (_PENALISED, _CONTROL):
        course = comparison.courses.get(name)
        if plain is not None and course is not None:
            sentences.append(_forgetting(name, plain.end, course.end))
    sentences += filter(None, [_control(comparison), _one_seed(held_out, facts)])
    costs = [
        f"{name} adds {course.run.penalty_share:.0%} to the rest of a step"
        for name, course in comparison.courses.items()
        if course.run.penalty_seconds
    ]
    if costs:
        sentences.append(f"The penalty's cost: {', '.join(costs)}.")
    return "\n".join(sentences)


def _learning(comparison: Comparison) -> str:
    before = comparison.before.task
    ends = ", ".join(
        f"{course.end.task.accuracy:.0%} after {name} (loss {course.end.task.loss:.3f})"
        for name, course in comparison.courses.items()
    )
    learned = [name for name, course in comparison.courses.items() if course.end.task.accuracy > before.accuracy]
    if len(learned) == len(comparison.courses):
        verdict = "All learned the task."
    else:
        verdict = f"Only {_enumerate(learned)} learned the task." if learned else "None learned the task."
    return f"Held-out sums right: {before.accuracy:.0%} before, {ends}. {verdict}"


def _forgetting(name: str, plain: State, end: State) -> str:
    """Compare an arm with plain fine-tuning, by the measures outside of the task."""
    divergence, reference = end.knowledge.divergence, plain.knowledge.divergence
    change = f" ({divergence / reference - 1:+.0%})" if reference > 0 else ""
    return (
        f"{name} against {_PLAIN}: KL of English {divergence:.4f} instead of {reference:.4f}{change}, loss of the "
        f"facts' true ends {end.knowledge.fact_loss - plain.knowledge.fact_loss:+.2f} nats, task loss "
        f"{end.task.loss - plain.task.loss:+.3f}."
    )


def _control(comparison: Comparison) -> str:
    """Say how much of the effect random subspaces have; empty where an arm is missing or there is no effect."""
    ends = [comparison.courses.get(name) for name in (_PLAIN, _PENALISED, _CONTROL)]
    if any(course is None for course in ends):
        return ""
    plain, penalised, control = (course.end.knowledge.divergence for course in ends if course is not None)
    if penalised > _EFFECT * plain:
        return (
            f"{_PENALISED} moved English hardly less than {_PLAIN}, or more: no effect to attribute to its subspaces."
        )
    share = (plain - control) / (plain - penalised)
    return (
        f"Random subspaces, which know nothing of W0, have {share:.0%} of the effect that the singular ones have on "
        "it: "
        + (
            "most of what the penalty does here comes from how much of each weight it holds, whichever directions."
            if share >= 0.5
            else "most of what the penalty does here comes from the choice of directions."
        )
    )


def _one_seed(held_out: int, facts: int) -> str:
    """Say which differences between two runs of one seed mean nothing."""
    sums, known = (100 * math.sqrt(0.25 / count) for count in (held_out, facts))
    return (
        f"This is one seed: shares of {held_out} sums and of {facts} facts have standard errors of up to {sums:.0f} "
        f"and {known:.0f} points, so that differences of that size say nothing; a difference in KL or loss says "
        "something when other seeds repeat it (--seeds 0 1 2)."
    )


def format_pairs(comparisons: dict[int, Comparison]) -> str:
    """Write, for each arm against plain fine-tuning, the differences of each seed and their mean.

    Returns:
        "" where there are fewer than two seeds or no plain fine-tuning.
    """
    names = [name for name in next(iter(comparisons.values())).courses if name != _PLAIN]
    if len(comparisons) < 2 or not all(_PLAIN in c.courses for c in comparisons.values()):
        return ""
    lines = [f"Differences from {_PLAIN} by seed, each with the same data:"]
    measures: list[tuple[str, Callable[[State], float]]] = [
        ("KL of English", lambda s: s.knowledge.divergence),
        ("loss of facts' true ends", lambda s: s.knowledge.fact_loss),
        ("task loss", lambda s: s.task.loss),
    ]
    for name in names:
        for title, value in measures:
            pairs = [value(c.courses[name].end) - value(c.courses[_PLAIN].end) for c in comparisons.values()]
            listed = ", ".join(f"{pair:+.4f}" for pair in pairs)
            error = statistics.stdev(pairs) / math.sqrt(len(pairs))
            lines.append(f"  {name}, {title}: {listed}; mean {statistics.mean(pairs):+.4f}, standard error {error:.4f}")
    return "\n".join(lines)


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
