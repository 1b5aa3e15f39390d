"""The report shows every provider, says where something else wins, and needs nothing but itself."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from benchmarks.reporting import report
from benchmarks.reporting.reading import load
from result_files import write as write_results

RUN: dict[str, Any] = {
    "device": "Toy <CPU>",
    "dirty": True,
    "command": "python benchmarks/suite.py --see https://example.org",
}
RESULT: dict[str, Any] = {"seconds": [0.010] * 4, "launches": 3, "provider": "native, base form"}
LAYER: list[dict[str, Any]] = [
    {},
    {"provider": "torch, base form", "status": "wrong", "seconds": [], "error": 0.31, "why": "gradient"},
    {"provider": "torch.mm", "role": "gemm", "seconds": [0.005] * 4, "error": None, "penalty_at_anchor": None},
    {
        "provider": "published, bf16",
        "role": "published",
        "seconds": [0.009, 0.009, 0.009, 0.011],
        "error": 0.37,
        "error_bound": None,
        "penalty_at_anchor": 0.5,
        "extra_bytes": 27 * 2**20,
    },
    {"provider": "published, fp32", "role": "published", "seconds": [0.03] * 4, "error": 0.001, "error_bound": None},
    {"provider": "published, fp16", "role": "published", "status": "not run", "seconds": [], "why": "too slow here"},
]
SCALING: list[dict[str, Any]] = [
    {"suite": "scaling", "case": f"rank {x}", "axis": "rank", "rank": x, "x": x, "seconds": [x / 100] * 3}
    for x in (4, 8, 16)
]
ANCHORS: list[dict[str, Any]] = [
    {"suite": "anchors", "case": "toy anchors", "provider": "randomised", "energy": 0.91, "flops": 0},
    {"suite": "anchors", "case": "toy anchors", "provider": "exact SVD", "role": "plain", "energy": 0.95, "flops": 0},
]


def write(path: Path, *results: dict[str, Any]) -> Path:
    return write_results(path, *({**RESULT, **result} for result in results), run=RUN)


class _Page(HTMLParser):
    """The rows of all tables, with their classes, and every address."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[tuple[str, list[str]]] = []
        self.addresses: list[str] = []
        self.tags: set[str] = set()
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append((given.get("class") or "", []))
        if tag in ("td", "th"):
            self._in_cell = True
            self.rows[-1][1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][1][-1] += data

    def row(self, provider: str) -> tuple[str, dict[str, str]]:
        """Class and cells, by title, of a provider's row in its suite's table."""
        titles: list[str] = []
        for kind, cells in self.rows:
            if cells[0] == "provider":
                titles = cells
            elif cells[0] == provider and titles:
                return kind, dict(zip(titles, cells, strict=True))
        raise AssertionError(f"{provider} has no row")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report")
    assert report.main([str(write(path / "toy.jsonl", *LAYER, *SCALING, *ANCHORS)), "--output", str(path / "out")]) == 0
    return path / "out"


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    return (folder / "toy.html").read_text(encoding="utf-8")


def test_every_provider_has_a_row(text: str) -> None:
    page = _Page(text)
    for row in [*LAYER, *ANCHORS]:
        page.row(row.get("provider", RESULT["provider"]))


def test_the_cells_are_what_a_hand_computes(text: str) -> None:
    kind, cells = _Page(text).row("native, base form")
    assert kind == "ours"
    assert cells["ms: median (min..max)"] == "10.0 (10.0..10.0)"
    assert cells["necessary FLOP/s"] == "0.40 GFLOP/s"
    assert cells["share of GEMM rate"] == "0.50 (0.50..0.50)"
    assert cells["bytes moved, share of bandwidth"] == "0.002 GB, 0.20"
    assert cells["time / ours"] == "1 (ours)"
    assert cells["gradient error against float64"] == "0.004, at drift 0.01"
    assert cells["penalty at the anchor"] == "0" and cells["extra memory, MiB"] == "1.0"
    assert cells["launches"] == "3" and cells["host overhead, ms"] == "0.1"
    _, cells = _Page(text).row("published, bf16")
    assert cells["time / ours"] == "0.90 (0.90..1.10)"


def test_wrong_is_red_and_has_no_time(text: str) -> None:
    kind, cells = _Page(text).row("torch, base form")
    assert kind == "wrong"
    assert cells["ms: median (min..max)"] == "not timed: error 0.31, bound 0.01 (gradient)"
    assert cells["time / ours"] == cells["necessary FLOP/s"] == "-"
    assert re.search(r"tr\.wrong td \{ background: #f8c8c8", text)
    # Nothing else is red.
    assert [kind for kind, _ in _Page(text).rows].count("wrong") == 1


def test_what_was_not_run_says_why(text: str) -> None:
    kind, cells = _Page(text).row("published, fp16")
    assert kind == "absent" and cells["ms: median (min..max)"] == "not run: too slow here"


def test_the_header_describes_the_run(text: str) -> None:
    header = {cells[0]: cells[1] for _, cells in _Page(text).rows[:9]}
    assert header["device"] == "Toy <CPU> (cpu), 2 threads"
    assert header["commit"] == "0123456789ab (uncommitted changes)"
    assert header["command"].endswith("--see https://example.org")
    assert header["versions"] == "python 3.11, torch 2.13, rpsft_kernels 0.1.0, numpy 2.0"
    assert header["load before the run"] == "0.50" and header["clocks"] == "not locked"


def test_the_page_needs_no_network_and_holds_its_plots(folder: Path, text: str) -> None:
    page = _Page(text)
    images = sorted((folder / "toy-plots").glob("*.png"))
    assert {path.name for path in images} == {
        "time-layer-toy.png",
        "scaling-rank.png",
        "error.png",
        "anchors.png",
    }
    prefix = "data:image/png;base64,"
    assert all(address.startswith(prefix) for address in page.addresses)
    embedded = {base64.b64decode(address.removeprefix(prefix)) for address in page.addresses}
    assert embedded == {path.read_bytes() for path in images}
    assert all(data.startswith(b"\x89PNG") for data in embedded)
    assert page.tags.isdisjoint({"script", "link", "iframe"})
    assert "url(" not in text and "@import" not in text


def test_where_something_else_wins_stands_before_the_tables(text: str) -> None:
    start, end = text.index("Where something else wins"), text.index("<h2>One layer's weights")
    assert start < end
    section = text[start:end]
    assert "faster in 3 of 4 rounds" in section
    assert "in 1 of the 2 cases" in section


def test_wins_name_case_and_measure(tmp_path: Path) -> None:
    found = report.find_wins(load(write(tmp_path / "r.jsonl", *LAYER, *ANCHORS)))
    assert [(win.case, win.measure, win.provider, win.ours) for win in found] == [
        ("toy layer k=4", "time", "published, bf16", "native, base form"),
        # In the anchors' case both take the same time: no win.
        ("toy layer k=4", "gradient error", "published, fp32", "native, base form"),
        ("toy anchors", "energy", "exact SVD", "randomised"),
    ]
    assert found[0].theirs.startswith("0.90 (0.90..1.10) times the time of ours")
    assert found[0].theirs.endswith("gradient error 0.37") and found[0].mine.endswith("gradient error 0.004")
    assert (found[1].theirs, found[1].mine) == ("0.001", "0.004")
    assert (found[2].theirs, found[2].mine) == ("0.95", "0.91")


def test_an_alternative_wins_where_ours_is_wrong(tmp_path: Path) -> None:
    wrong = {"status": "wrong", "seconds": [], "error": 0.5}
    plain = {"provider": "plain torch, base form", "role": "plain"}
    (win,) = report.find_wins(load(write(tmp_path / "r.jsonl", wrong, plain)))
    assert win.provider == "plain torch, base form" and win.mine == "not timed: error 0.5, bound 0.01"


def test_an_anchor_has_no_gradient(tmp_path: Path) -> None:
    rows = [{**row, "error": 1e-4} for row in ANCHORS]
    text = report.format_page(load(write(tmp_path / "r.jsonl", *rows)), [])
    _, cells = _Page(text).row("randomised")
    assert cells["energy lost of the best possible"] == "0.0001" and cells["energy"] == "0.91"
    assert "gradient error against float64" not in cells


def test_the_gemm_is_no_alternative(tmp_path: Path) -> None:
    gemm = {"provider": "torch.mm", "role": "gemm", "seconds": [0.001] * 4, "error": None, "extra_bytes": 0}
    assert report.find_wins(load(write(tmp_path / "r.jsonl", {}, gemm))) == []


def test_a_report_of_nothing_but_failures_is_made(tmp_path: Path) -> None:
    rows = [{"status": "wrong", "seconds": [], "error": float("nan")}, {"suite": "model", "flops": 0, "bytes": 0}]
    path = report.write_report(load(write(tmp_path / "r.jsonl", *rows)), tmp_path)
    assert "error nan" in path.read_text() and "Nothing to say" in path.read_text()


def test_plots_of_an_earlier_run_do_not_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", {})
    report.write_report(load(path), tmp_path)
    write(path, {"error": None})
    report.write_report(load(path), tmp_path)
    assert [image.name for image in (tmp_path / "r-plots").iterdir()] == ["time-layer-toy.png"]


def test_a_broken_file_is_an_error_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        report.main([str(write(tmp_path / "r.jsonl", {"rank": "four"}))])
    assert ended.value.code == 2
    assert "r.jsonl:2: field 'rank'" in capsys.readouterr().err
