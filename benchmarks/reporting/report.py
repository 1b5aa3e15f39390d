"""Writes a result file of the benchmarks as one HTML page: where something else wins, the tables, the plots.

python -m benchmarks.reporting.report RESULTS.jsonl [--output FOLDER]

Writes FOLDER/NAME.html, which needs no other file and no network, and the plots as PNG beside it, in FOLDER/NAME-plots.
FOLDER is output/benchmarks by default.
"""

from __future__ import annotations

import argparse
import base64
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.reporting.formatting import format_memory, format_number, format_rate, format_spread, format_times
from benchmarks.reporting.plots import Plot, write_plots
from benchmarks.reporting.reading import load
from benchmarks.reporting.results import (
    SUITES,
    BenchmarkRun,
    CaseResults,
    Result,
    ResultFile,
    bandwidth_shares,
    gemm_shares,
    ratios,
)

_SUITE_TITLES = {
    "layer": "One layer's weights",
    "model": "Whole models",
    "scaling": "Scaling",
    "anchors": "Building anchors",
}
# The GEMM computes no penalty: it shows the machine's rate, and cannot replace this package.
_ALTERNATIVES = ("plain", "published", "reference")


@dataclass(frozen=True)
class Win:
    """One measure in which an alternative is better than ours.

    Attributes:
        provider: the alternative.
        ours: the provider that it is compared with.
        theirs, mine: their values, as printed.
    """

    suite: str
    case: str
    measure: str
    provider: str
    ours: str
    theirs: str
    mine: str


def find_wins(file: ResultFile) -> list[Win]:
    """Find every case and measure in which an alternative beats ours; times first.

    Values that print alike are no win. An alternative wins in time if the median of its ratios to ours is below 1.
    """
    return [win for case in file.cases for win in _wins_in_time(case)] + [
        win for case in file.cases for win in _other_wins(case)
    ]


def _wins_in_time(case: CaseResults) -> list[Win]:
    ours, wins = case.ours, []
    mine = [result for result in case.results if result.role == "ours"]
    for result in case.results:
        if result.role not in _ALTERNATIVES or not result.timed or not mine:
            continue
        if ours is None:
            # An alternative wins as well where ours has no time.
            why = format_times(mine[0])
            wins.append(
                Win(
                    case.suite,
                    case.name,
                    "time",
                    provider=result.provider,
                    ours=mine[0].provider,
                    theirs=f"{format_times(result)} ms",
                    mine=why,
                )
            )
            continue
        shares = ratios(result, ours)
        if shares and statistics.median(shares) < 1:
            faster = sum(ratio < 1 for ratio in shares)
            theirs = (
                f"{format_spread(shares, 2)} times the time of ours, faster in {faster} of {len(shares)} rounds; "
                f"{format_times(result)} ms"
            )
            mine_text = f"{format_times(ours)} ms"
            # A faster time is worth little if the gradient is worse.
            if result.gradient_error is not None and ours.gradient_error is not None:
                theirs += f"; gradient error {format_number(result.gradient_error)}"
                mine_text += f"; gradient error {format_number(ours.gradient_error)}"
            wins.append(
                Win(
                    case.suite,
                    case.name,
                    "time",
                    provider=result.provider,
                    ours=ours.provider,
                    theirs=theirs,
                    mine=mine_text,
                )
            )
    return wins


@dataclass(frozen=True)
class _Measure:
    name: str
    value: Callable[[Result], float | None]
    text: Callable[[Result], str]
    more_is_better: bool = False


_MEASURES = (
    _Measure("gradient error", lambda r: r.gradient_error, lambda r: format_number(r.gradient_error)),
    _Measure(
        "penalty at the anchor",
        lambda r: None if r.penalty_at_anchor is None else abs(r.penalty_at_anchor),
        lambda r: format_number(r.penalty_at_anchor),
    ),
    _Measure("extra memory, MiB", lambda r: r.extra_bytes, lambda r: format_memory(r.extra_bytes)),
    _Measure("energy", lambda r: r.energy, lambda r: format_number(r.energy, 4), more_is_better=True),
)


def _other_wins(case: CaseResults) -> list[Win]:
    wins: list[Win] = []
    ours = case.ours
    if ours is None:
        return wins
    for measure in _MEASURES:
        mine = measure.value(ours)
        if mine is None:
            continue
        for result in case.results:
            theirs = measure.value(result)
            if result.role not in _ALTERNATIVES or result.status == "wrong" or theirs is None:
                continue
            better = theirs > mine if measure.more_is_better else theirs < mine
            # A value that is not a number is beaten by every one that is.
            better = better or (math.isnan(mine) and not math.isnan(theirs))
            if better and measure.text(result) != measure.text(ours):
                wins.append(
                    Win(
                        case.suite,
                        case.name,
                        measure.name,
                        provider=result.provider,
                        ours=ours.provider,
                        theirs=measure.text(result),
                        mine=measure.text(ours),
                    )
                )
    return wins


def _error_text(result: Result) -> str:
    if result.gradient_error is None:
        return "-"
    bound = result.error_bound
    # The comparison is written so that NaN is above every bound.
    above = "" if bound is None or result.gradient_error <= bound else f" (above {bound:.2g})"
    return f"{result.gradient_error:.2g}{above}, at drift {result.drift:.2g}"


@dataclass(frozen=True)
class _Column:
    title: str
    cell: Callable[[CaseResults, Result, BenchmarkRun], str]
    # False leaves the column out where no result of a suite has a value.
    always: bool = False


def _over_ours(case: CaseResults, result: Result, _: BenchmarkRun) -> str:
    if case.ours is None:
        return "-"
    if result is case.ours:
        return "1 (ours)"
    values = ratios(result, case.ours)
    return format_spread(values, 1 if values and statistics.median(values) >= 10 else 2)


def _gemm_share(case: CaseResults, result: Result, _: BenchmarkRun) -> str:
    return "-" if case.gemm is None else format_spread(gemm_shares(result, case.gemm), 2)


def _rate(_: CaseResults, result: Result, __: BenchmarkRun) -> str:
    return format_rate(result.flops, result.median) if result.timed else "-"


def _bandwidth_share(_: CaseResults, result: Result, run: BenchmarkRun) -> str:
    shares = bandwidth_shares(result, run)
    return f"{result.bytes / 1e9:.3g} GB, {statistics.median(shares):.2f}" if shares else "-"


def _host(_: CaseResults, result: Result, __: BenchmarkRun) -> str:
    return "-" if result.host_seconds is None else f"{1e3 * result.host_seconds:.3g}"


_COLUMNS = (
    _Column("provider", lambda _, result, __: result.provider, always=True),
    _Column("role", lambda _, result, __: result.role, always=True),
    _Column("ms: median (min..max)", lambda _, result, __: format_times(result), always=True),
    _Column("necessary FLOP/s", _rate),
    _Column("share of GEMM rate", _gemm_share),
    _Column("bytes moved, share of bandwidth", _bandwidth_share),
    _Column("time / ours", _over_ours, always=True),
    _Column("gradient error against float64", lambda _, result, __: _error_text(result)),
    _Column("penalty at the anchor", lambda _, result, __: format_number(result.penalty_at_anchor)),
    _Column("energy", lambda _, result, __: format_number(result.energy, 4)),
    _Column("energy lost of the best possible", lambda _, result, __: format_number(result.lost_energy)),
    _Column("extra memory, MiB", lambda _, result, __: format_memory(result.extra_bytes)),
    _Column("launches", lambda _, result, __: "-" if result.launches is None else str(result.launches)),
    _Column("host overhead, ms", _host),
)


def _facts(case: CaseResults) -> str:
    """Describe a case beside its name."""
    first = case.results[0]
    facts = [f"k = {first.rank}", first.dtype, f"{first.weights} weights, {first.elements / 1e6:.3g} M elements"]
    if first.axis is not None:
        facts.append(f"{first.axis} = {first.x:g}")
    flops = max(result.flops for result in case.results)
    if flops:
        facts.append(f"{flops / 1e9:.3g} necessary GFLOP")
    rounds = max(len(result.seconds) for result in case.results)
    return ", ".join([*facts, f"{rounds} rounds"])


def _suite_table(cases: Sequence[CaseResults], run: BenchmarkRun) -> str:
    columns = [
        column
        for column in _COLUMNS
        if column.always or any(column.cell(case, result, run) != "-" for case in cases for result in case.results)
    ]
    lines = ["<table>", _row("th", [column.title for column in columns])]
    for case in cases:
        lines.append(
            f'<tr class="case"><th colspan="{len(columns)}">{escape(case.name)} '
            f"<small>{escape(_facts(case))}</small></th></tr>"
        )
        for result in case.results:
            kind = {"wrong": "wrong", "not run": "absent"}.get(result.status, "ours" if result is case.ours else "")
            lines.append(_row("td", [column.cell(case, result, run) for column in columns], kind))
    return "\n".join([*lines, "</table>"])


def _row(tag: str, cells: Sequence[str], kind: str = "") -> str:
    opening = f'<tr class="{kind}">' if kind else "<tr>"
    return opening + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _wins_section(file: ResultFile) -> str:
    wins = find_wins(file)
    compared = sum(
        any(result.role in _ALTERNATIVES and result.timed for result in case.results)
        and any(result.role == "ours" for result in case.results)
        for case in file.cases
    )
    lines = ["<h2>Where something else wins</h2>"]
    in_time = {(win.suite, win.case) for win in wins if win.measure == "time"}
    if not compared:
        lines.append("<p>Nothing to say: no case has both ours and a timed alternative.</p>")
    else:
        lines.append(
            f"<p>An alternative is faster than ours, or ours has no time, in {len(in_time)} of the {compared} cases "
            "that have both. Ours is, in each case, the fastest timed provider of this package that accumulates in "
            "base form, or the fastest of all its providers where there is none.</p>"
        )
    for title, chosen in (
        ("In time", [win for win in wins if win.measure == "time"]),
        ("In other measures", [win for win in wins if win.measure != "time"]),
    ):
        if chosen:
            header = ["suite", "case", "measure", "alternative", "its value", "ours", "our value"]
            lines += [f"<h3>{title}</h3>", '<table class="wins">', _row("th", header)]
            lines += [
                _row("td", [win.suite, win.case, win.measure, win.provider, win.theirs, win.ours, win.mine])
                for win in chosen
            ]
            lines.append("</table>")
    return "\n".join(lines)


def _header(run: BenchmarkRun) -> str:
    entries = [
        ("device", f"{run.device} ({run.device_type}), {run.threads} threads"),
        ("clocks", run.clocks),
        ("instruction set", run.isa or "-"),
        ("bandwidth", f"{run.bandwidth / 1e9:.4g} GB/s measured" if run.bandwidth else "not measured"),
        ("versions", run.versions_text),
        ("commit", run.commit_text),
        ("command", run.command),
        ("started", run.started.isoformat(sep=" ", timespec="seconds")),
        ("load before the run", f"{run.load:.2f}"),
    ]
    return (
        "<table>" + "".join(f"<tr><th>{name}</th><td>{escape(text)}</td></tr>" for name, text in entries) + "</table>"
    )


_STYLE = """
body { font: 14px/1.45 sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; margin: 0.7em 0; }
th, td { border: 1px solid #ccc; padding: 2px 8px; text-align: left; vertical-align: top; }
th { background: #f3f3f3; }
tr.case th { background: #e2e8ef; }
tr.case small { font-weight: normal; color: #555; margin-left: 1em; }
tr.ours td { font-weight: bold; }
tr.wrong td { background: #f8c8c8; color: #800; }
tr.absent td { color: #777; }
table.wins td { background: #fff6df; }
img { max-width: 100%; }
"""


def format_page(file: ResultFile, plots: Sequence[Plot]) -> str:
    """Write the whole HTML page, plots included."""
    title = f"rpsft_kernels benchmarks: {file.run.device}"
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        _header(file.run),
        _wins_section(file),
    ]
    for suite in SUITES:
        cases = [case for case in file.cases if case.suite == suite]
        if cases:
            lines += [f"<h2>{_SUITE_TITLES[suite]}</h2>", _suite_table(cases, file.run)]
    lines.append(
        "<p>Ratios and shares are computed round by round, for in a round every provider of a case takes its turn; "
        "medians (min..max) of the rounds are shown. Necessary operations and bytes are those that no implementation "
        "can do without. Red: the gradient is wrong, and nothing was timed.</p>"
    )
    if plots:
        lines.append("<h2>Plots</h2>")
    for plot in plots:
        data = base64.b64encode(plot.path.read_bytes()).decode("ascii")
        text = escape(plot.title, quote=True)
        lines += [f"<h3>{text}</h3>", f'<img alt="{text}" src="data:image/png;base64,{data}">']
    return "\n".join([*lines, "</body></html>\n"])


def write_report(file: ResultFile, folder: Path) -> Path:
    """Write page and plots of ``file`` into ``folder``, which is made where it is missing, and return the page's path.

    Raises:
        OSError: ``folder`` cannot be written.
    """
    images = folder / f"{file.path.stem}-plots"
    images.mkdir(parents=True, exist_ok=True)
    # Plots of an earlier run of the same name would pass for this one's.
    for old in images.glob("*.png"):
        old.unlink()
    path = folder / f"{file.path.stem}.html"
    path.write_text(format_page(file, write_plots(file, images)), encoding="utf-8")
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A result file as one HTML page with plots.")
    parser.add_argument("results", type=Path, metavar="RESULTS.jsonl")
    parser.add_argument("--output", type=Path, default=Path("output/benchmarks"), metavar="FOLDER")
    arguments = parser.parse_args(argv)
    try:
        file = load(arguments.results)
        path = write_report(file, arguments.output)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    wrong = [result for result in file.results if result.status == "wrong"]
    in_time = [win for win in find_wins(file) if win.measure == "time"]
    print(f"{path}: {len(file.cases)} cases, {len(wrong)} wrong results, {len(in_time)} times an alternative is faster")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
