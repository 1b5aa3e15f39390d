"""Writes what the demo prints: a table of the measurements, and a conclusion from them in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .experiment import Comparison, State


@dataclass(frozen=True)
class Forgetting:
    """The change of one measure of knowledge in each run; positive is worse than before training."""

    name: str
    sft: float
    rpsft: float


def format_table(comparison: Comparison) -> str:
    """Write one line per measurement: before training, after plain fine-tuning, after RPSFT."""
    states = (comparison.before, comparison.sft.end, comparison.rpsft.end)
    seconds = [f"{course.run.seconds_per_step:.2f}" for course in (comparison.sft, comparison.rpsft)]

    def row(name: str, values: Sequence[str]) -> str:
        return f"{name:<42}" + "".join(f"{value:>12}" for value in values)

    def measurement(name: str, form: str, values: Sequence[float]) -> str:
        return row(name, [form.format(value) for value in values])

    lines = [
        row("", ["before", "SFT", "RPSFT"]),
        measurement("task: loss, nats per token", "{:.3f}", [s.task.loss for s in states]),
        measurement("task: held-out sums answered right", "{:.1%}", [s.task.accuracy for s in states]),
        measurement("elsewhere: facts ranked right", "{:.1%}", [s.knowledge.facts for s in states]),
        measurement("elsewhere: loss of true ends, nats", "{:.3f}", [s.knowledge.fact_loss for s in states]),
        measurement("elsewhere: perplexity of English", "{:.2f}", [s.knowledge.perplexity for s in states]),
        measurement("penalty R", "{:.4g}", [s.penalty for s in states]),
        measurement("relative drift ||W-W0|| / ||W0||", "{:.2e}", [s.drift for s in states]),
        row("seconds per step (median)", ["", *seconds]),
        row("of which the penalty's", ["", "", f"{comparison.rpsft.run.penalty_seconds_per_step:.2f}"]),
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]])


def measure_forgetting(comparison: Comparison) -> list[Forgetting]:
    """Compare every measure that has nothing to do with the task, oriented so that more is worse."""
    before, sft, rpsft = (s.knowledge for s in (comparison.before, comparison.sft.end, comparison.rpsft.end))
    return [
        Forgetting("facts ranked right", before.facts - sft.facts, before.facts - rpsft.facts),
        Forgetting("loss of true ends", sft.fact_loss - before.fact_loss, rpsft.fact_loss - before.fact_loss),
        Forgetting("perplexity of English", sft.perplexity - before.perplexity, rpsft.perplexity - before.perplexity),
    ]


def conclusion(comparison: Comparison) -> str:
    """Say in words what the measurements show; they decide every word that could be otherwise."""
    before, sft, rpsft = comparison.before, comparison.sft.end, comparison.rpsft.end
    learned = (
        f"Held-out sums right: {before.task.accuracy:.0%} before, {sft.task.accuracy:.0%} after SFT, "
        f"{rpsft.task.accuracy:.0%} after RPSFT ({_learning(before, sft, rpsft)})."
    )
    measures = measure_forgetting(comparison)
    if all(m.sft <= 0 and m.rpsft <= 0 for m in measures):
        kept = "Neither run is worse than the pretrained model on any measure outside the task: nothing to prevent."
    else:
        better = [m.name for m in measures if m.rpsft < m.sft]
        worse = [m.name for m in measures if m.rpsft > m.sft]
        same = [m.name for m in measures if m.rpsft == m.sft]
        verdicts = [
            f"{verdict} by {_enumerate(names)}"
            for verdict, names in (("less", better), ("more", worse), ("equally much", same))
            if names
        ]
        kept = f"Outside the task, RPSFT forgot {', '.join(verdicts)}, compared with SFT."
    cost = f"The penalty adds {comparison.rpsft.run.penalty_share:.0%} to the rest of a step."
    return f"{learned}\n{kept}\n{_gap(comparison)}\n{cost}"


def _learning(before: State, sft: State, rpsft: State) -> str:
    runs = (("SFT", sft), ("RPSFT", rpsft))
    learned = [name for name, state in runs if state.task.accuracy > before.task.accuracy]
    if not learned:
        return "neither learned the task"
    return "both learned" if len(learned) == 2 else f"only {learned[0]} learned"


def _gap(comparison: Comparison) -> str:
    by_name = {m.name: m for m in measure_forgetting(comparison)}
    perplexity = by_name["perplexity of English"]
    return (
        f"Perplexity of English changed by {perplexity.sft:+.2f} with SFT and by {perplexity.rpsft:+.2f} with RPSFT; "
        "one run each, one seed: other seeds (--seed) tell how far such differences are chance."
    )


def _enumerate(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
