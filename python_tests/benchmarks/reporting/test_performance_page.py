"""The figures of docs/performance.md are those of the result files, and a figure edited by hand is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.reporting import performance_page
from benchmarks.reporting.reading import load
from result_files import write as write_results

RESULT: dict[str, Any] = {"seconds": [0.010] * 3, "flops": 3_000_000_000, "extra_bytes": 838861}
PUBLISHED: dict[str, Any] = {"role": "published", "error_bound": None}
ROWS: list[dict[str, Any]] = [
    {},
    {"provider": "native, base form, autograd", "seconds": [0.008] * 3},
    {"provider": "native, block form", "seconds": [0.0095] * 3},
    {"provider": "torch, base form", "seconds": [0.032] * 3},
    {"provider": "plain torch, base form", "role": "plain", "seconds": [0.020] * 3},
    {"provider": "torch.mm", "role": "gemm", "seconds": [0.0092] * 3, "error": None},
    {**PUBLISHED, "provider": "published, fp16", "status": "not run", "seconds": [], "why": "slow", "error": 0.5},
    {**PUBLISHED, "provider": "published, bf16", "seconds": [0.0116] * 3, "error": 0.37, "extra_bytes": 27 * 2**20},
    {**PUBLISHED, "provider": "published, fp32", "seconds": [0.033] * 3, "error": 0.0012},
    {**PUBLISHED, "provider": "published, bf16, torch.compile", "seconds": [0.009] * 3, "error": 0.36},
]
PAGE = f"# Title\n\nbefore\n\n{performance_page.BEGIN}\n{performance_page.END}\n\nafter\n"


def write(path: Path, *results: dict[str, Any], run: dict[str, Any] | None = None) -> Path:
    return write_results(path, *({**RESULT, **result} for result in results), run=run)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(text: str) -> list[dict[str, str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(cells(lines[0]), cells(line), strict=True)) for line in lines[2:]]


def test_the_table_is_what_a_hand_computes(tmp_path: Path) -> None:
    text = performance_page.write_tables([load(write(tmp_path / "r.jsonl", *ROWS))])
    assert table(text) == [
        {
            "layer, rank": "toy, 4",
            "ours": "native, base form",
            "time and rate": "10.0 ms, 300 GFLOP/s",
            "share of `torch.mm`'s rate": "0.92",
            "block form": "0.95x",
            "plain torch": "2.00x",
            "published, bf16": "1.16x",
            "published, bf16, compiled": "0.90x",
            "published, fp32": "3.30x",
            "published, fp16": "not run",
            "extra MiB: ours, published bf16": "0.8, 27.0",
            "gradient error: ours": "0.004",
            "published bf16, fp32, fp16": "0.37, 0.0012, 0.5",
        }
    ]


def test_the_caption_says_where_the_figures_are_from(tmp_path: Path) -> None:
    dirty = performance_page.write_tables([load(write(tmp_path / "r.jsonl", *ROWS, run={"dirty": True}))])
    caption = " ".join(dirty.partition("\n\n")[2].split())
    for part in (
        "3 interleaved rounds",
        "relative drift 0.01",
        "Toy CPU, 2 threads, clocks: not locked, instruction set avx2",
        "python 3.11, torch 2.13, rpsft_kernels 0.1.0, numpy 2.0",
        "commit 0123456789ab (uncommitted changes), 2026-01-02",
        "`python benchmarks/suite.py`",
    ):
        assert part in caption
    assert all(len(line) <= 120 for line in dirty.splitlines() if not line.startswith("|"))


def test_the_fastest_backend_is_ours_and_a_wrong_one_has_no_time(tmp_path: Path) -> None:
    wrong = {"status": "wrong", "seconds": [], "error": 0.3}
    (row,) = table(performance_page.write_tables([load(write(tmp_path / "r.jsonl", wrong, *ROWS[3:]))]))
    assert row["ours"] == "torch, base form" and row["time and rate"].startswith("32.0 ms")
    (row,) = table(performance_page.write_tables([load(write(tmp_path / "r.jsonl", wrong, *ROWS[4:]))]))
    assert row["time and rate"] == "not timed: error 0.3, bound 0.01" and "plain torch" not in row


def test_columns_that_no_row_fills_are_left_out(tmp_path: Path) -> None:
    (row,) = table(performance_page.write_tables([load(write(tmp_path / "r.jsonl", *ROWS[:4]))]))
    assert "block form" in row
    assert not any("published," in title or "plain" in title for title in row if title != "published bf16, fp32, fp16")


def test_rows_of_two_dtypes_are_told_apart(tmp_path: Path) -> None:
    other = {"case": "toy layer k=4 float32", "dtype": "float32"}
    rows = table(performance_page.write_tables([load(write(tmp_path / "r.jsonl", {}, other))]))
    assert [row["layer, rank"] for row in rows] == ["toy, 4, bfloat16", "toy, 4, float32"]


def test_the_newest_file_of_each_device_counts(tmp_path: Path) -> None:
    gpu = {"device": "A GPU", "device_type": "cuda", "isa": None}
    files = [
        load(write(tmp_path / "gpu.jsonl", {"provider": "triton, base form"}, run=gpu)),
        load(write(tmp_path / "new.jsonl", {"seconds": [0.020] * 3}, run={"started": "2026-02-01T00:00:00+00:00"})),
        load(write(tmp_path / "old.jsonl", {"seconds": [0.050] * 3})),
    ]
    text = performance_page.write_tables(files)
    assert text == performance_page.write_tables(files[::-1])
    assert text.count("| layer, rank |") == 2 and "20.0 ms" in text and "50.0 ms" not in text
    assert text.index("native, base form") < text.index("triton, base form")


def test_writing_is_idempotent_and_leaves_the_rest_alone(tmp_path: Path) -> None:
    results, page = write(tmp_path / "r.jsonl", *ROWS), tmp_path / "performance.md"
    page.write_text(PAGE)
    arguments = [str(results), "--page", str(page)]
    assert performance_page.main(arguments) == 0
    first = page.read_text()
    assert first.startswith("# Title\n\nbefore\n\n") and first.endswith(f"{performance_page.END}\n\nafter\n")
    assert "300 GFLOP/s" in first
    assert performance_page.main(arguments) == 0
    assert page.read_text() == first


def test_check_notices_an_edited_figure_and_writes_nothing(tmp_path: Path) -> None:
    results, page = write(tmp_path / "r.jsonl", *ROWS), tmp_path / "performance.md"
    arguments = [str(results), "--page", str(page)]
    page.write_text(PAGE)
    assert performance_page.main([*arguments, "--check"]) == 1
    assert page.read_text() == PAGE
    performance_page.main(arguments)
    assert performance_page.main([*arguments, "--check"]) == 0
    edited = page.read_text().replace("300 GFLOP/s", "350 GFLOP/s")
    page.write_text(edited)
    assert performance_page.main([*arguments, "--check"]) == 1
    assert page.read_text() == edited
    # Text outside the markers is nobody's figure.
    performance_page.main(arguments)
    page.write_text(page.read_text().replace("before", "earlier"))
    assert performance_page.main([*arguments, "--check"]) == 0


def test_printing_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "performance.md"
    page.write_text(PAGE)
    assert performance_page.main([str(write(tmp_path / "r.jsonl", *ROWS)), "--page", str(page), "--print"]) == 0
    assert "10.0 ms, 300 GFLOP/s" in capsys.readouterr().out
    assert page.read_text() == PAGE


@pytest.mark.parametrize(
    "page",
    [
        "no markers",
        performance_page.BEGIN,
        f"{performance_page.END}\n{performance_page.BEGIN}\n",
        f"{PAGE}{performance_page.BEGIN}\n",
    ],
)
def test_markers_are_needed_once_each(page: str) -> None:
    with pytest.raises(ValueError, match="expected one of each, in this order"):
        performance_page.replace_tables(page, "figures")


def test_a_file_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"r\.jsonl: got no result of suite 'layer'"):
        performance_page.write_tables([load(write(tmp_path / "r.jsonl", {"suite": "model"}))])


def test_the_page_holds_what_the_committed_figures_say() -> None:
    assert performance_page.main(["--check"]) == 0
