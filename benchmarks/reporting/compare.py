"""Compares two result files of the benchmarks: results that got faster or slower, and those that only one file has.

python -m benchmarks.reporting.compare A B [--threshold 5] [--all] [--fail-on-slower]

A difference counts only where the intervals (min..max) of the rounds do not overlap and the medians differ by more than
the threshold. It counts as the provider's own only if its time relative to the GEMM provider of the same file differs
likewise, for otherwise it is the machine's. With --fail-on-slower, ends with status 1 if a provider of this package got
slower, or was timed in A and is wrong in B.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reporting.formatting import format_spread, format_times
from benchmarks.reporting.reading import load
from benchmarks.reporting.results import CaseResults, Result, ResultFile, ratios

Key = tuple[str, str, str]


@dataclass(frozen=True)
class Change:
    """One quantity in both files; smaller is faster.

    Attributes:
        before, after: the values by round.
        threshold: the smallest relative change that counts.
    """

    before: Sequence[float]
    after: Sequence[float]
    threshold: float

    @property
    def factor(self) -> float:
        return statistics.median(self.after) / statistics.median(self.before)

    @property
    def verdict(self) -> str:
        """ "slower", "faster" or "" where the rounds do not tell them apart."""
        # A single round has no interval, and nothing tells how far another round would differ.
        if min(len(self.before), len(self.after)) < 2:
            return ""
        # A factor and its inverse are the same change, so that swapping the files swaps the verdicts.
        if min(self.after) > max(self.before) and self.factor > 1 + self.threshold:
            return "slower"
        if max(self.after) < min(self.before) and 1 / self.factor > 1 + self.threshold:
            return "faster"
        return ""

    def row(self, scale: float = 1.0) -> str:
        """Write the cells of a table: before, after, change."""
        before, after = ([scale * value for value in values] for values in (self.before, self.after))
        return f"{format_spread(before)} | {format_spread(after)} | {100 * (self.factor - 1):+.1f}%"


@dataclass(frozen=True)
class Pair:
    """One provider that was timed in both files.

    Attributes:
        relative: time over that of the case's GEMM provider; None for that provider and where a file has none.
    """

    key: Key
    role: str
    time: Change
    relative: Change | None

    @property
    def verdict(self) -> str:
        """ "slower", "faster", "machine" where time and relative time disagree, or "" where nothing changed."""
        if self.relative is None or self.time.verdict == self.relative.verdict:
            return self.time.verdict
        return "machine"


@dataclass(frozen=True)
class Comparison:
    """The results that both files have, and those that only one has.

    Attributes:
        pairs: providers that were timed in both files.
        turned: providers whose status differs, before and after.
        only_before, only_after: keys of one file alone, in its order.
    """

    pairs: list[Pair]
    turned: list[tuple[Result, Result]]
    only_before: list[Key]
    only_after: list[Key]

    def of(self, verdict: str) -> list[Pair]:
        """List the pairs of a verdict: this package's first, then by the size of the change."""
        pairs = [pair for pair in self.pairs if pair.verdict == verdict]
        return sorted(pairs, key=lambda pair: (pair.role != "ours", -abs(pair.time.factor - 1)))

    @property
    def failures(self) -> list[Key]:
        """This package's providers that got slower or wrong."""
        slower = [pair.key for pair in self.of("slower") if pair.role == "ours"]
        # A slower provider must not pass because it is wrong as well, and thus not timed.
        wrong = [_key(after) for before, after in self.turned if before.timed and after.status == "wrong"]
        ours = {_key(after) for _, after in self.turned if after.role == "ours"}
        return slower + [key for key in wrong if key in ours]


def _key(result: Result) -> Key:
    return result.suite, result.case, result.provider


def compare(before: ResultFile, after: ResultFile, threshold: float = 0.05) -> Comparison:
    """Match the results by suite, case and provider.

    Args:
        threshold: relative change of the medians up to which a time counts as unchanged.
    """
    olds, news = ({_key(result): result for result in file.results} for file in (before, after))
    old_cases, new_cases = ({(case.suite, case.name): case for case in file.cases} for file in (before, after))
    pairs, turned = [], []
    for key, old in olds.items():
        if key not in news:
            continue
        new = news[key]
        if old.status != new.status:
            turned.append((old, new))
        elif old.timed:
            relative = None
            if old.role != "gemm":
                relative = _relative(old, old_cases[key[:2]], new, new_cases[key[:2]], threshold)
            pairs.append(Pair(key, new.role, Change(old.seconds, new.seconds, threshold), relative))
    return Comparison(
        pairs,
        turned,
        [key for key in olds if key not in news],
        [key for key in news if key not in olds],
    )


def _relative(
    old: Result, old_case: CaseResults, new: Result, new_case: CaseResults, threshold: float
) -> Change | None:
    old_gemm, new_gemm = old_case.gemm, new_case.gemm
    if old_gemm is None or new_gemm is None or old_gemm.provider != new_gemm.provider:
        return None
    change = Change(ratios(old, old_gemm), ratios(new, new_gemm), threshold)
    # A GEMM that ran once has no spread, and must not overrule the times.
    return change if min(len(change.before), len(change.after)) >= 2 else None


def warnings(before: ResultFile, after: ResultFile) -> list[str]:
    """List differences between the runs that are not differences between the kernels."""
    differences = []
    for name in ("device", "device_type", "clocks", "threads", "isa"):
        old, new = getattr(before.run, name), getattr(after.run, name)
        if old != new:
            differences.append(f"{name} differs: {old!r} and {new!r}")
    names = dict.fromkeys([*before.run.versions, *after.run.versions])
    for name in names:
        old, new = before.run.versions.get(name), after.run.versions.get(name)
        # The comparison is of two commits of this package.
        if old != new and name != "rpsft_kernels":
            differences.append(f"version of {name} differs: {old} and {new}")
    return differences


def _table(pairs: Sequence[Pair]) -> list[str]:
    lines = [
        "| suite | case | provider | role | ms, A | ms, B | change | over gemm, A | over gemm, B | change |",
        "|---" * 10 + "|",
    ]
    for pair in pairs:
        relative = "- | - | -" if pair.relative is None else pair.relative.row()
        lines.append(f"| {' | '.join(pair.key)} | {pair.role} | {pair.time.row(1e3)} | {relative} |")
    return lines


def format_comparison(
    before: ResultFile, after: ResultFile, comparison: Comparison, threshold: float, unchanged: bool = False
) -> str:
    """Write the differences in Markdown; with ``unchanged``, also the times that do not differ."""
    lines = []
    for letter, file in (("A", before), ("B", after)):
        run = file.run
        lines.append(f"{letter}: {file.path}: {run.device}, {run.versions_text}, commit {run.commit_text}")
    lines += [f"warning: {warning}" for warning in warnings(before, after)]
    lines.append(
        f"\nTimes are medians (min..max). A change counts above {100 * threshold:g}% and where the rounds of A "
        "and B do not overlap."
    )
    titles = {
        "slower": "Slower",
        "faster": "Faster",
        "machine": "Changed in time or against the GEMM, not in both: the machine, or the GEMM itself",
    }
    for verdict, title in titles.items():
        pairs = comparison.of(verdict)
        lines += [f"\n### {title}: {len(pairs)}", *([""] + _table(pairs) if pairs else [])]
    same = comparison.of("")
    lines.append(f"\n### No difference: {len(same)} of {len(comparison.pairs)} providers timed in both")
    if same and unchanged:
        lines += ["", *_table(same)]
    if comparison.turned:
        lines.append("\n### Status changed\n")
        for old, new in comparison.turned:
            cells = [f"{format_times(result)} ms" if result.timed else format_times(result) for result in (old, new)]
            lines.append(f"- {', '.join(_key(new))}: {cells[0]} -> {cells[1]}")
    for letter, keys in (("A", comparison.only_before), ("B", comparison.only_after)):
        if keys:
            lines += [f"\n### Only in {letter}\n", *(f"- {', '.join(key)}" for key in keys)]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What got faster or slower between two result files.")
    parser.add_argument("before", metavar="A", type=Path, help="result file to compare with")
    parser.add_argument("after", metavar="B", type=Path, help="result file to judge")
    parser.add_argument(
        "--threshold", type=float, default=5.0, metavar="PERCENT", help="smallest change that counts (default 5)"
    )
    parser.add_argument("--all", action="store_true", help="print also the times of what did not change")
    parser.add_argument(
        "--fail-on-slower", action="store_true", help="status 1 if a provider of this package got slower or wrong"
    )
    arguments = parser.parse_args(argv)
    if not arguments.threshold >= 0:
        parser.error(f"--threshold: got {arguments.threshold}, expected at least 0")
    try:
        before, after = load(arguments.before), load(arguments.after)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    threshold = arguments.threshold / 100
    comparison = compare(before, after, threshold)
    print(format_comparison(before, after, comparison, threshold, arguments.all))
    if not arguments.fail_on_slower or not comparison.failures:
        return 0
    print("\nSlower or wrong:\n" + "\n".join(f"- {', '.join(key)}" for key in comparison.failures))
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
