"""Plots the curves of both runs into a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .experiment import Comparison, Course

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind readers can tell these colours apart, and print has the marks.
_STYLES = {"SFT": ("#d55e00", "o"), "RPSFT": ("#0072b2", "s")}


def plot_comparison(comparison: Comparison, title: str, path: Path) -> None:
    """Write task loss, penalty and the measures outside the task, over the steps of both runs, to ``path``.

    Raises:
        OSError: ``path`` cannot be written.
    """
    # A figure of its own, without pyplot, needs no display and leaves the caller's backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    ((task, penalty), (facts, prose)) = figure.subplots(2, 2)
    for label, course in (("SFT", comparison.sft), ("RPSFT", comparison.rpsft)):
        _curve(task, label, course.run.losses, faint=True)
        _points(task, f"{label}, held-out sums", label, course, [s.task.loss for s in course.states])
        # The run recorded R before each update; the final state has R after the last one.
        _curve(penalty, label, [*course.run.penalties, course.end.penalty])
        _points(facts, label, label, course, [100 * s.knowledge.facts for s in course.states])
        _points(prose, label, label, course, [s.knowledge.perplexity for s in course.states])

    task.set(title="Task loss (thin: training batches)", ylabel="cross-entropy (nats per answer token)")
    task.set_yscale("log")
    penalty.set(title="Rotation penalty", ylabel="R = $\\Sigma\\,\\|U^T (W - W_0) V\\|_F^2$ (no unit)")
    # R is exactly 0 at the first step, which a logarithm cannot show.
    positive = [r for c in (comparison.sft, comparison.rpsft) for r in c.run.penalties if r > 0]
    if positive:
        penalty.set_yscale("symlog", linthresh=min(positive), linscale=0.3)
        penalty.set_ylim(bottom=0)
    facts.set(title="Outside the task: facts", ylabel="true end ranked first (% of facts)")
    prose.set(title="Outside the task: English prose", ylabel="perplexity (lower is better)")
    facts.axhline(100 * comparison.before.knowledge.facts, **_REFERENCE)
    prose.axhline(comparison.before.knowledge.perplexity, **_REFERENCE)
    for axes in (task, penalty, facts, prose):
        axes.set_xlabel("optimizer steps")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


_REFERENCE = {"color": "0.4", "linestyle": "--", "linewidth": 1, "label": "pretrained"}


def _curve(axes: Axes, label: str, values: Sequence[float], faint: bool = False) -> None:
    colour = _STYLES[label][0]
    look = {"alpha": 0.45, "linewidth": 1} if faint else {"label": label, "linewidth": 1.8}
    axes.plot(range(len(values)), values, color=colour, **look)


def _points(axes: Axes, legend: str, label: str, course: Course, values: Sequence[float]) -> None:
    colour, mark = _STYLES[label]
    axes.plot([s.step for s in course.states], values, color=colour, marker=mark, label=legend)
