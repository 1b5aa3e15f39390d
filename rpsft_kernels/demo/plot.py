"""Plots the curves of all runs of one seed into a PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .experiment import Comparison, Course, State

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind readers can tell these colours apart, and print has the marks.
_STYLES = {"SFT": ("#d55e00", "o"), "RPSFT": ("#0072b2", "s"), "random": ("#009e73", "^")}


def plot_comparison(comparison: Comparison, title: str, path: Path) -> None:
    """Write task loss, penalty and the measures outside the task, over the steps of all runs, to ``path``.

    Raises:
        OSError: ``path`` cannot be written.
    """
    # A figure of its own, without pyplot, needs no display and leaves the caller's backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    ((task, penalty), (prose, facts)) = figure.subplots(2, 2)
    for name, course in comparison.courses.items():
        _curve(task, name, course.run.losses)
        _points(task, f"{name}, held-out sums", name, course, lambda s: s.task.loss)
        _points(penalty, name, name, course, lambda s: s.penalty, joined=not course.run.penalties)
        _curve(penalty, name, course.run.penalties)
        _points(prose, name, name, course, lambda s: s.knowledge.divergence)
        _points(facts, name, name, course, lambda s: s.knowledge.fact_loss)

    task.set(title="Task loss (thin: training batches)", ylabel="cross-entropy (nats per answer token)")
    task.set_yscale("log")
    penalty.set(
        title="Rotation penalty, in the arm's own subspaces",
        ylabel="R = $\\Sigma\\,\\|U^T (W - W_0) V\\|_F^2$ (no unit)",
    )
    # R is exactly 0 at the first step, which a logarithm cannot show.
    positive = [s.penalty for c in comparison.courses.values() for s in c.states if s.penalty > 0]
    if positive:
        penalty.set_yscale("symlog", linthresh=min(positive), linscale=0.3)
        penalty.set_ylim(bottom=0)
    prose.set(title="Outside the task: English prose", ylabel="KL(pretrained || tuned) (nats per token)")
    facts.set(title="Outside the task: facts asked in the chat", ylabel="loss of true ends (nats)")
    facts.axhline(comparison.before.knowledge.fact_loss, color="0.4", linestyle="--", linewidth=1, label="pretrained")
    for axes in (task, penalty, prose, facts):
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, name: str, values: Sequence[float]) -> None:
    axes.plot(range(len(values)), values, color=_STYLES[name][0], alpha=0.45, linewidth=1)


def _points(
    axes: Axes, legend: str, name: str, course: Course, value: Callable[[State], float], joined: bool = True
) -> None:
    colour, mark = _STYLES[name]
    line = "-" if joined else "none"
    steps = [state.step for state in course.states]
    axes.plot(steps, [value(s) for s in course.states], linestyle=line, color=colour, marker=mark, label=legend)
