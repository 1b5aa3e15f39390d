"""Plots a result file as PNG: times relative to ours, scaling, gradient errors, anchors."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.reporting.results import CaseResults, Result, ResultFile, ratios

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A hue for each role, for colour-blind readers too; shades and marks tell its providers apart, also in print.
_SHADES = {
    "ours": ("#0072b2", "#56b4e9", "#003f63", "#a6d5f2", "#3d5a80"),
    "gemm": ("#7f7f7f", "#b5b5b5"),
    "plain": ("#009e73", "#7fd1b9", "#00543d"),
    "published": ("#d55e00", "#e69f00", "#8c3d00", "#f3c98b"),
    "reference": ("#cc79a7", "#7d3c63"),
}
_MARKS = "osD^vP*X<>"
_WRONG = "#cc0000"
# Tall enough for a bar's label to be read.
_ROW = 0.24


@dataclass(frozen=True)
class Plot:
    title: str
    path: Path


class _Look:
    """Colour and mark of each provider, the same in every plot of a file."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._of: dict[str, tuple[str, str]] = {}
        seen: dict[str, int] = {}
        for result in results:
            if result.provider not in self._of:
                index = seen.setdefault(result.role, 0)
                seen[result.role] += 1
                shades = _SHADES[result.role]
                self._of[result.provider] = (shades[index % len(shades)], _MARKS[len(self._of) % len(_MARKS)])

    def colour(self, provider: str) -> str:
        return self._of[provider][0]

    def mark(self, provider: str) -> str:
        return self._of[provider][1]

    def sorted(self, providers: Iterable[str]) -> list[str]:
        wanted = set(providers)
        return [provider for provider in self._of if provider in wanted]


def write_plots(file: ResultFile, folder: Path) -> list[Plot]:
    """Write every plot that the file has figures for into ``folder``, and say which.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    look = _Look(file.results)
    cases = file.cases
    made: list[Plot] = []

    def add(title: str, name: str, figure: Figure | None) -> None:
        if figure is not None:
            path = folder / f"{_slug(name)}.png"
            figure.savefig(path, dpi=110)
            made.append(Plot(title, path))

    for suite in ("layer", "model"):
        of_suite = [case for case in cases if case.suite == suite]
        for model in dict.fromkeys(case.results[0].model for case in of_suite):
            group = [case for case in of_suite if case.results[0].model == model]
            named = f"{suite}: {model}" if model is not None else suite
            add(f"Time relative to ours, {named}", f"time {named}", _relative_times(group, look))
    scaling = [case for case in cases if case.suite == "scaling" and case.results[0].axis is not None]
    for axis in dict.fromkeys(case.results[0].axis for case in scaling):
        group = [case for case in scaling if case.results[0].axis == axis]
        add(f"Scaling with {axis}", f"scaling {axis}", _scaling(str(axis), group, look))
    add("Gradient error against float64", "error", _errors(file.results, look))
    add("Anchors: time and energy", "anchors", _anchors([c for c in cases if c.suite == "anchors"], look))
    return made


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _figure(width: float, height: float) -> Figure:
    # A figure of its own, without pyplot, needs no display and leaves the caller's backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _bars(
    axes: Axes,
    cases: Sequence[CaseResults],
    look: _Look,
    values_of: Callable[[CaseResults, Result], Sequence[float]],
    start_at: float = 0.0,
) -> bool:
    """Draw a group of horizontal bars for each case, medians with the interval of their values; tell if there were any.

    What is wrong has words in the place of a bar.
    """
    position = 0.0
    ticks, labels, named = [], [], set()
    for case in cases:
        start = position
        for result in case.results:
            values = values_of(case, result)
            if not values and result.status == "wrong":
                text = f"{result.provider}: wrong, not timed"
                place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
                axes.annotate(text, (start_at, position), color=_WRONG, size=7, **place)
                position += 1
            if not values:
                continue
            middle = statistics.median(values)
            label = None if result.provider in named else result.provider
            named.add(result.provider)
            axes.barh(
                position,
                middle - start_at,
                left=start_at,
                height=0.85,
                color=look.colour(result.provider),
                label=label,
                xerr=[[middle - min(values)], [max(values) - middle]],
                error_kw={"elinewidth": 1, "ecolor": "0.15"},
            )
            # Outwards from where the bars start.
            side = 1 if middle >= start_at else -1
            end = max(values) if side > 0 else min(values)
            alignment = "left" if side > 0 else "right"
            place = {"xytext": (3 * side, 0), "textcoords": "offset points", "va": "center", "ha": alignment}
            axes.annotate(f"{middle:.3g}", (end, position), size=7, **place)
            position += 1
        if position > start:
            ticks.append((start + position - 1) / 2)
            labels.append(case.name)
            position += 1
    axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.grid(alpha=0.3, axis="x")
    return bool(ticks)


def _height(cases: Sequence[CaseResults]) -> float:
    return 1.8 + _ROW * sum(len(case.results) + 1 for case in cases)


def _relative_times(cases: Sequence[CaseResults], look: _Look) -> Figure | None:
    compared = [case for case in cases if case.ours is not None]
    if not compared:
        return None
    figure = _figure(10, _height(compared))
    axes = figure.subplots()

    def values(case: CaseResults, result: Result) -> list[float]:
        assert case.ours is not None
        return ratios(result, case.ours)

    # From 1, so that on a logarithmic axis a bar's length is how far it is from ours, to either side.
    _bars(axes, compared, look, values, start_at=1.0)
    axes.margins(x=0.12)
    axes.axvline(1, color="0.2", linewidth=1, linestyle="--")
    # A slow alternative takes hundreds of times as long.
    axes.set_xscale("log")
    axes.set_xlabel("time / ours (median, min and max of the rounds; left of 1 is faster than ours)")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _scaling(axis: str, cases: Sequence[CaseResults], look: _Look) -> Figure | None:
    """Draw one panel for each model and dtype; rounds are bands around the medians."""
    panels: dict[tuple[str | None, str], list[CaseResults]] = {}
    for case in cases:
        panels.setdefault((case.results[0].model, case.results[0].dtype), []).append(case)
    # A line for each provider, and for each rank if several ranks have the same x.
    lines_of = {panel: _lines(group) for panel, group in panels.items()}
    panels = {panel: group for panel, group in panels.items() if lines_of[panel]}
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = _figure(6.5 * columns, 4.2 * rows + 1)
    grid = figure.subplots(rows, columns, squeeze=False)
    labelled: dict[str, Artist] = {}
    for axes, panel in zip(grid.flat, panels, strict=False):
        for (provider, rank), points in lines_of[panel].items():
            xs, times = zip(*sorted(points), strict=True)
            label = provider if rank is None else f"{provider}, k = {rank}"
            colour = look.colour(provider)
            (line,) = axes.plot(xs, [statistics.median(t) for t in times], color=colour, marker=look.mark(provider))
            axes.fill_between(xs, [min(t) for t in times], [max(t) for t in times], color=colour, alpha=0.2)
            labelled.setdefault(label, line)
        # A logarithm shows neither zero nor less.
        if all(x > 0 for points in lines_of[panel].values() for x, _ in points):
            axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set(title=", ".join(filter(None, panel)), xlabel=axis, ylabel="seconds")
        axes.grid(alpha=0.3, which="both")
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.legend(labelled.values(), labelled.keys(), loc="outside lower center", ncols=3)
    return figure


def _lines(cases: Sequence[CaseResults]) -> dict[tuple[str, int | None], list[tuple[float, tuple[float, ...]]]]:
    """Collect (x, seconds) of each provider, and of each rank where one provider has an x more than once."""
    timed = [result for case in cases for result in case.results if result.timed and result.x is not None]
    ambiguous = len({(result.provider, result.x) for result in timed}) < len(timed)
    lines: dict[tuple[str, int | None], list[tuple[float, tuple[float, ...]]]] = {}
    for result in timed:
        assert result.x is not None
        key = (result.provider, result.rank if ambiguous else None)
        lines.setdefault(key, []).append((result.x, result.seconds))
    return lines


def _errors(results: Sequence[Result], look: _Look) -> Figure | None:
    """Draw a mark for each case, red where it is wrong; errors that are not finite are counted beside the name."""
    measured = [result for result in results if result.gradient_error is not None]
    if not measured:
        return None
    providers = look.sorted(result.provider for result in measured)
    figure = _figure(10, 1.8 + 0.35 * len(providers))
    axes = figure.subplots()
    smallest = min((e for r in measured if (e := r.gradient_error) and math.isfinite(e)), default=1.0)
    labels = []
    for row, provider in enumerate(providers):
        own = [result for result in measured if result.provider == provider]
        finite = [
            result for result in own if result.gradient_error is not None and math.isfinite(result.gradient_error)
        ]
        labels.append(provider if len(finite) == len(own) else f"{provider} ({len(own) - len(finite)} not finite)")
        for wrong in (False, True):
            shown = [result for result in finite if (result.status == "wrong") == wrong]
            colour = _WRONG if wrong else look.colour(provider)
            mark = "x" if wrong else look.mark(provider)
            axes.scatter(
                [r.gradient_error or 0.0 for r in shown], [row] * len(shown), color=colour, marker=mark, alpha=0.7
            )
        bounds = {result.error_bound for result in own if result.error_bound}
        if bounds:
            axes.scatter(sorted(bounds), [row] * len(bounds), color="0.2", marker="|", s=250)
    axes.set_yticks(range(len(providers)), labels)
    axes.set_ylim(len(providers) - 0.5, -0.5)
    # An error of exactly 0 is a result as well.
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.3)
    largest = max(axes.get_xlim()[1], smallest)
    axes.set_xlim(-smallest / 4, 2 * largest)
    axes.set_xlabel("relative gradient error against float64, by case (bar: bound; red cross: wrong)")
    axes.grid(alpha=0.3, axis="x")
    return figure


def _anchors(cases: Sequence[CaseResults], look: _Look) -> Figure | None:
    if not any(result.timed or result.energy is not None for case in cases for result in case.results):
        return None
    figure = _figure(12, _height(cases))
    seconds, energy = figure.subplots(1, 2)
    _bars(seconds, cases, look, lambda _, result: result.seconds)
    seconds.margins(x=0.12)
    # Margins would leave room for negative times.
    seconds.set_xlim(left=0)
    seconds.set(title="Time of building the anchors", xlabel="seconds (median, min and max of the rounds)")
    if _bars(energy, cases, look, lambda _, result: [] if result.energy is None else [result.energy]):
        energy.set_xlim(0, 1.12)
    energy.set(title="What the anchors hold", xlabel="energy: share of the weights' squared norm")
    handles: dict[str, Artist] = {}
    for axes in (seconds, energy):
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return figure
