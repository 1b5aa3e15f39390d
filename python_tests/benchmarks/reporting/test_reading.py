"""Reading result files of the benchmarks, and refusing damaged ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reporting.formatting import format_times
from benchmarks.reporting.reading import load
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
    assert format_times(result) == "not timed: error nan, bound 0.01"
