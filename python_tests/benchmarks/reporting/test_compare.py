"""A difference is reported where the rounds show one, in the right direction, and not where the machine explains it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reporting import compare
from benchmarks.reporting.reading import load
from result_files import RUN, write

FAST, MIDDLE, SLOW = [0.100, 0.101, 0.102], [0.100, 0.110, 0.130], [0.120, 0.121, 0.122]
GEMM = {"provider": "torch.mm", "role": "gemm"}


def compared(
    folder: Path, before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], threshold: float = 0.05
) -> compare.Comparison:
    files = [load(write(folder / f"{name}.jsonl", *rows)) for name, rows in (("a", before), ("b", after))]
    return compare.compare(*files, threshold)


def verdict(folder: Path, before: Sequence[float], after: Sequence[float], threshold: float = 0.05) -> str:
    (pair,) = compared(folder, [{"seconds": before}], [{"seconds": after}], threshold).pairs
    return pair.verdict


def test_both_directions_are_flagged(tmp_path: Path) -> None:
    assert verdict(tmp_path, FAST, SLOW) == "slower"
    assert verdict(tmp_path, SLOW, FAST) == "faster"
    assert verdict(tmp_path, FAST, FAST) == ""


def test_overlapping_rounds_are_not_flagged(tmp_path: Path) -> None:
    # The medians differ by 10%.
    assert verdict(tmp_path, MIDDLE, SLOW) == verdict(tmp_path, SLOW, MIDDLE) == ""


def test_changes_below_the_threshold_are_not_flagged(tmp_path: Path) -> None:
    # 20% apart.
    assert verdict(tmp_path, FAST, SLOW, 0.25) == verdict(tmp_path, SLOW, FAST, 0.25) == ""


def test_a_single_round_tells_nothing(tmp_path: Path) -> None:
    assert verdict(tmp_path, [0.1], SLOW) == verdict(tmp_path, FAST, [0.3]) == ""


def test_a_slower_machine_is_no_slower_kernel(tmp_path: Path) -> None:
    before = [{"seconds": FAST}, {**GEMM, "seconds": [0.05] * 3}]
    slower_machine = [{"seconds": SLOW}, {**GEMM, "seconds": [0.06] * 3}]
    ours, gemm = compared(tmp_path, before, slower_machine).pairs
    assert ours.time.verdict == "slower" and ours.verdict == "machine"
    assert gemm.verdict == "slower" and gemm.relative is None
    slower_kernel = [{"seconds": SLOW}, {**GEMM, "seconds": [0.05] * 3}]
    ours, _ = compared(tmp_path, before, slower_kernel).pairs
    assert ours.verdict == "slower"
    assert ours.relative is not None and ours.relative.factor == pytest.approx(0.121 / 0.101)


def test_a_faster_gemm_is_no_slower_kernel(tmp_path: Path) -> None:
    before = [{"seconds": FAST}, {**GEMM, "seconds": [0.05] * 3}]
    ours, _ = compared(tmp_path, before, [{"seconds": FAST}, {**GEMM, "seconds": [0.03] * 3}]).pairs
    assert ours.relative is not None and ours.relative.verdict == "slower" and ours.verdict == "machine"


def test_results_are_matched_by_suite_case_and_provider(tmp_path: Path) -> None:
    before = [{"seconds": FAST}, {"seconds": FAST, "case": "old"}, {"seconds": FAST, "provider": "gone"}]
    after = [{"seconds": FAST}, {"seconds": FAST, "suite": "model", "case": "old"}]
    found = compared(tmp_path, before, after)
    assert [pair.key for pair in found.pairs] == [("layer", "toy layer k=4", "native, base form")]
    assert found.only_before == [("layer", "old", "native, base form"), ("layer", "toy layer k=4", "gone")]
    assert found.only_after == [("model", "old", "native, base form")]


def test_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = write(tmp_path / "a.jsonl", {"seconds": FAST}, {"seconds": FAST, "provider": "gone"})
    versions = {**RUN["versions"], "torch": "2.14", "rpsft_kernels": "0.2.0"}
    run = {"device": "Other CPU", "versions": versions}
    after = write(tmp_path / "b.jsonl", {"seconds": SLOW}, {"seconds": FAST, "provider": "new"}, run=run)
    assert compare.main([str(before), str(after)]) == 0
    text = capsys.readouterr().out
    assert "warning: device differs: 'Toy CPU' and 'Other CPU'" in text
    assert "warning: version of torch differs: 2.13 and 2.14" in text
    assert "version of rpsft_kernels" not in text
    assert "### Slower: 1" in text and "### Faster: 0" in text
    assert "| 101 (100..102) | 121 (120..122) | +19.8% |" in text
    assert "### Only in A\n\n- layer, toy layer k=4, gone" in text
    assert "### Only in B\n\n- layer, toy layer k=4, new" in text


def test_what_did_not_change_is_counted_and_listed_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write(tmp_path / "a.jsonl", {"seconds": FAST}))
    compare.main([path, path])
    text = capsys.readouterr().out
    assert "### No difference: 1 of 1 providers" in text and "native, base form" not in text
    compare.main([path, path, "--all"])
    assert "| native, base form | ours | 101 (100..102) | 101 (100..102) | +0.0% |" in capsys.readouterr().out


def test_fail_on_slower_is_about_ours_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = {"provider": "published, bf16", "role": "published"}
    fast = write(tmp_path / "a.jsonl", {"seconds": FAST}, {**theirs, "seconds": FAST})
    slow_ours = write(tmp_path / "b.jsonl", {"seconds": SLOW}, {**theirs, "seconds": FAST})
    slow_theirs = write(tmp_path / "c.jsonl", {"seconds": FAST}, {**theirs, "seconds": SLOW})
    assert compare.main([str(fast), str(slow_ours), "--fail-on-slower"]) == 1
    assert "Slower or wrong:\n- layer, toy layer k=4, native, base form" in capsys.readouterr().out
    assert compare.main([str(fast), str(slow_ours)]) == 0
    assert compare.main([str(slow_ours), str(fast), "--fail-on-slower"]) == 0
    assert compare.main([str(fast), str(slow_theirs), "--fail-on-slower"]) == 0
    assert compare.main([str(fast), str(slow_ours), "--fail-on-slower", "--threshold", "25"]) == 0


def test_wrong_does_not_hide_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "a.jsonl", {"seconds": FAST})
    wrong = write(tmp_path / "b.jsonl", {"status": "wrong", "seconds": [], "error": 0.5})
    assert compare.main([str(good), str(wrong), "--fail-on-slower"]) == 1
    assert "101 (100..102) ms -> not timed: error 0.5, bound 0.01" in capsys.readouterr().out
    absent = write(tmp_path / "c.jsonl", {"status": "not run", "seconds": [], "why": "no compiler"})
    assert compare.main([str(good), str(absent), "--fail-on-slower"]) == 0
    assert "-> not run: no compiler" in capsys.readouterr().out


def test_errors_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "a.jsonl", {})
    broken = write(tmp_path / "b.jsonl", {"flops": None})
    for arguments, message in (
        ([good, broken], "b.jsonl:2: field 'flops'"),
        ([good, good, "--threshold", "-1"], "--threshold: got -1.0"),
        ([good, tmp_path / "none.jsonl"], "none.jsonl"),
    ):
        with pytest.raises(SystemExit) as ended:
            compare.main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
