"""Result files are refused where they are broken, by line and field; the figures made of rounds are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reporting.results import (
    bandwidth_shares,
    gemm_shares,
    load,
    rate_text,
    ratio_text,
    ratios,
    spread,
    times_text,
)
from result_files import RESULT, RUN, write


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    gemm = {"provider": "torch.mm", "role": "gemm", "error": None, "error_bound": None}
    file = load(write(tmp_path / "r.jsonl", {}, gemm, {"case": "another"}))
    assert file.run.device == "Toy CPU" and file.run.bandwidth == 1e9
    assert file.run.started.isoformat() == "2026-01-02T03:04:05+00:00"
    assert file.run.commit_text == "0123456789ab"
    assert [case.name for case in file.cases] == ["toy layer k=4", "another"]
    assert file.results[0].seconds == (0.010, 0.020, 0.040) and file.results[0].median == 0.020
    assert file.cases[0].gemm is file.results[1] and file.cases[1].gemm is None


def test_uncommitted_changes_and_a_time_without_zone(tmp_path: Path) -> None:
    run = load(write(tmp_path / "r.jsonl", run={"dirty": True, "started": "2026-01-02T03:04:05"})).run
    assert run.commit_text == "0123456789ab (uncommitted changes)"
    assert run.started.isoformat() == "2026-01-02T03:04:05+00:00"


@pytest.mark.parametrize("name", sorted(set(RUN) - {"kind"}))
def test_a_missing_field_of_the_run_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({key: value for key, value in RUN.items() if key != name}) + "\n")
    with pytest.raises(ValueError, match=rf"r\.jsonl:1: field '{name}': missing, expected "):
        load(path)


@pytest.mark.parametrize("name", sorted(set(RESULT) - {"kind"}))
def test_a_missing_field_of_a_result_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "r.jsonl"
    row = {key: value for key, value in RESULT.items() if key != name}
    path.write_text(f"{json.dumps(RUN)}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=rf"r\.jsonl:2: field '{name}': missing, expected "):
        load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("schema", 2),
        ("device_type", "tpu"),
        ("threads", 2.5),
        ("versions", {"python": "3.11"}),
        ("isa", 3),
        ("dirty", 0),
        ("started", "yesterday"),
        ("load", "low"),
        ("bandwidth_bytes_per_second", None),
    ],
)
def test_a_wrong_type_in_the_run_is_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf":1: field '{name}': got .*, expected "):
        load(write(tmp_path / "r.jsonl", run={name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("suite", "other"),
        ("case", ""),
        ("model", 3),
        ("rank", True),
        ("rank", -1),
        ("x", "8"),
        ("role", "mine"),
        ("status", "ok"),
        ("why", None),
        ("seconds", 0.1),
        ("seconds", [0.1, None]),
        ("seconds", [0.1, 0.0]),
        ("seconds", [0.1, math.inf]),
        ("flops", 1.5),
        ("bytes", None),
        ("error", "small"),
        ("drift", None),
        ("extra_bytes", -3),
        ("launches", "5"),
        ("host_seconds", math.nan),
        ("energy", 250.0),
    ],
)
def test_a_wrong_type_in_a_result_is_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf":3: field '{name}': got .*, expected "):
        load(write(tmp_path / "r.jsonl", {"provider": "fine"}, {name: value}))


def test_lines_that_are_no_results_are_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(RESULT))
    with pytest.raises(ValueError, match=r":1: field 'kind': got 'result', expected 'run'"):
        load(path)
    path.write_text(f"{json.dumps(RUN)}\n{json.dumps(RUN)}\n")
    with pytest.raises(ValueError, match=r":2: field 'kind': got 'run', expected 'result'"):
        load(path)
    path.write_text(f"{json.dumps(RUN)}\n{json.dumps(RESULT)[:50]}")
    with pytest.raises(ValueError, match=r"r\.jsonl:2: not JSON"):
        load(path)
    path.write_text(f"{json.dumps(RUN)}\n[]\n")
    with pytest.raises(ValueError, match=r":2: got list, expected an object"):
        load(path)
    path.write_text("")
    with pytest.raises(ValueError, match="empty"):
        load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"r\.jsonl: not UTF-8"):
        load(path)


def test_a_provider_appears_once_in_a_case(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r":3: field 'provider': got 'native, base form' again .* line 2"):
        load(write(tmp_path / "r.jsonl", {}, {}))


def test_a_case_is_one_problem(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r":3: field 'rank': got 8, expected 4 as on line 2"):
        load(write(tmp_path / "r.jsonl", {}, {"provider": "other", "rank": 8}))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seconds": []}, "seconds"),
        ({"status": "wrong"}, "seconds"),
        ({"status": "not run"}, "seconds"),
        ({"axis": "rank"}, "x"),
        # A wrong gradient of this package has no speed.
        ({"error": 0.5}, "status"),
        ({"error": math.nan}, "status"),
    ],
)
def test_contradictions_are_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValueError, match=rf":2: field '{field}': got "):
        load(write(tmp_path / "r.jsonl", change))


def test_an_error_that_is_not_a_number_is_read_of_a_wrong_result(tmp_path: Path) -> None:
    (result,) = load(write(tmp_path / "r.jsonl", {"status": "wrong", "seconds": [], "error": math.nan})).results
    assert times_text(result) == "not timed: error nan, bound 0.01"


def test_ratios_are_of_the_same_round(tmp_path: Path) -> None:
    other = {"provider": "published, bf16", "role": "published", "seconds": [0.020, 0.010, 0.020]}
    once = {"provider": "published, fp16", "role": "published", "seconds": [0.5]}
    ours, published, single = load(write(tmp_path / "r.jsonl", {}, other, once)).results
    # The ratio of the medians would be 1.
    assert ratios(published, ours) == pytest.approx([2.0, 0.5, 0.5])
    assert ratios(single, ours) == pytest.approx([50.0])


def test_shares_of_rate_and_bandwidth(tmp_path: Path) -> None:
    gemm = {"provider": "torch.mm", "role": "gemm", "seconds": [0.005, 0.005, 0.030]}
    file = load(write(tmp_path / "r.jsonl", {}, gemm, {"provider": "none", "flops": 0, "bytes": 0}))
    ours, products, none = file.results
    assert gemm_shares(ours, products) == pytest.approx([0.5, 0.25, 0.75])
    # 2 MB in 10, 20 and 40 ms, of 1 GB/s.
    assert bandwidth_shares(ours, file.run) == pytest.approx([0.2, 0.1, 0.05])
    assert gemm_shares(none, products) == [] and bandwidth_shares(none, file.run) == []


def test_ours_is_the_fastest_that_accumulates_in_base_form(tmp_path: Path) -> None:
    names = {
        "native, base form, autograd": 0.001,
        "native, block form": 0.002,
        "torch, base form": 0.004,
        "native, base form": 0.003,
    }
    rows = [{"provider": name, "seconds": [seconds] * 3} for name, seconds in names.items()]
    rows.append({"provider": "plain torch, base form", "role": "plain", "seconds": [0.0001] * 3})
    (case,) = load(write(tmp_path / "r.jsonl", *rows)).cases
    assert case.ours is not None and case.ours.provider == "native, base form"
    block = case.fastest("ours", "block")
    assert block is not None and block.provider == "native, block form"
    (case,) = load(write(tmp_path / "r.jsonl", *rows[:2])).cases
    assert case.ours is not None and case.ours.provider == "native, base form, autograd"
    (case,) = load(write(tmp_path / "r.jsonl", rows[-1])).cases
    assert case.ours is None


def test_numbers_are_printed_with_their_spread(tmp_path: Path) -> None:
    assert spread([]) == "-" and spread([1.234]) == "1.23"
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00..3.00)"
    assert spread([120.4, 119.6, 250.2]) == "120 (120..250)"
    assert [ratio_text(v) for v in ([], [0.943], [12.34], [523.4])] == ["-", "0.94x", "12.3x", "523x"]
    assert rate_text(308e9, 1.0) == "308 GFLOP/s" and rate_text(5.123e12, 0.01) == "512 TFLOP/s"
    assert rate_text(0, 1.0) == "-"
    (result,) = load(write(tmp_path / "r.jsonl", {"status": "not run", "seconds": [], "why": "no GPU"})).results
    assert times_text(result) == "not run: no GPU"
