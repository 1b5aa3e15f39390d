"""Figures of results as text."""

from __future__ import annotations

from pathlib import Path

from benchmarks.reporting.formatting import format_rate, format_ratio, format_spread, format_times
from benchmarks.reporting.reading import load
from result_files import write


def test_numbers_are_printed_with_their_spread(tmp_path: Path) -> None:
    assert format_spread([]) == "-" and format_spread([1.234]) == "1.23"
    assert format_spread([3.0, 1.0, 2.0]) == "2.00 (1.00..3.00)"
    assert format_spread([120.4, 119.6, 250.2]) == "120 (120..250)"
    assert [format_ratio(v) for v in ([], [0.943], [12.34], [523.4])] == ["-", "0.94x", "12.3x", "523x"]
    assert format_rate(308e9, 1.0) == "308 GFLOP/s" and format_rate(5.123e12, 0.01) == "512 TFLOP/s"
    assert format_rate(0, 1.0) == "-"
    (result,) = load(write(tmp_path / "r.jsonl", {"status": "not run", "seconds": [], "why": "no GPU"})).results
    assert format_times(result) == "not run: no GPU"
