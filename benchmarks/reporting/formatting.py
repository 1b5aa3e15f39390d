"""Formats the figures of results as text: times, ratios, rates and memory."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from benchmarks.reporting.results import Result


def choose_digits(values: Iterable[float]) -> int:
    """Choose decimals that leave the median at least three significant digits; at most four decimals."""
    middle = abs(statistics.median(values))
    return 0 if middle >= 100 else 1 if middle >= 10 else 2 if middle >= 1 else 3 if middle >= 0.1 else 4


def format_spread(values: Sequence[float], digits: int | None = None) -> str:
    """Write the median (min..max); "-" for no value, and a single value alone."""
    if not values:
        return "-"
    digits = choose_digits(values) if digits is None else digits
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def format_times(result: Result) -> str:
    """Write milliseconds, or why there are none."""
    if result.timed:
        return format_spread([1e3 * seconds for seconds in result.seconds])
    if result.status == "wrong":
        bound = "" if result.error_bound is None else f", bound {result.error_bound:.2g}"
        error = "" if result.error is None else f": error {result.error:.2g}{bound}"
        return f"not timed{error}" + (f" ({result.why})" if result.why else "")
    return f"not run: {result.why}" if result.why else "not run"


def format_ratio(values: Sequence[float]) -> str:
    """Write the median of ratios, with an x; "-" for no ratio."""
    if not values:
        return "-"
    middle = statistics.median(values)
    return f"{middle:.{0 if middle >= 100 else 1 if middle >= 10 else 2}f}x"


def format_rate(flops: float, seconds: float) -> str:
    """Write operations per second with their unit."""
    if not flops:
        return "-"
    rate = flops / seconds / 1e9
    # From 1000 GFLOP/s on, four digits would say more than the spread allows.
    value, unit = (rate, "GFLOP/s") if rate < 1000 else (rate / 1000, "TFLOP/s")
    return f"{value:.{min(choose_digits([value]), 2)}f} {unit}"


def format_memory(count: int | None) -> str:
    """Write bytes in MiB; "-" for None."""
    return "-" if count is None else f"{count / 2**20:.{1 if count < 100 * 2**20 else 0}f}"


def format_number(value: float | None, digits: int = 2) -> str:
    """Write significant digits; "-" for None."""
    return "-" if value is None else f"{value:.{digits}g}"
