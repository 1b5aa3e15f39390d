"""The demo's table in the pages is that of the committed measurements."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.reporting import demo_page
from rpsft_kernels.demo.record import read_record
from rpsft_kernels.demo.report import format_markdown

ROOT = Path(__file__).parents[3]
PAGE = f"# Title\n\nbefore\n\n{demo_page.BEGIN}\n{demo_page.END}\n\nafter\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "demo.json", tmp_path / "docs")
    for page in ("docs/accuracy.md", "README.md"):
        (tmp_path / page).write_text(PAGE)
    return tmp_path


def test_the_pages_hold_what_the_committed_measurements_say() -> None:
    assert demo_page.main(["--check"]) == 0
    assert (ROOT / "docs" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_writing_is_idempotent_and_leaves_the_rest_alone(root: Path) -> None:
    assert demo_page.main([], root) == 0
    pages = [(root / page).read_text() for page in ("docs/accuracy.md", "README.md")]
    table = format_markdown(read_record(root / "docs" / "demo.json")[1][0])
    for page in pages:
        assert page.startswith("# Title\n\nbefore\n\n") and page.endswith(f"{demo_page.END}\n\nafter\n")
        assert table in page and max(len(line) for line in page.splitlines() if not line.startswith("|")) <= 120
    assert "This is one seed" in pages[0] and "This is one seed" not in pages[1]
    assert demo_page.main([], root) == 0
    assert pages == [(root / page).read_text() for page in ("docs/accuracy.md", "README.md")]


def test_check_notices_an_edited_figure(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo_page.main(["--check"], root) == 1
    assert "accuracy.md does not hold what" in capsys.readouterr().out
    demo_page.main([], root)
    assert demo_page.main(["--check"], root) == 0
    record = root / "docs" / "demo.json"
    content = json.loads(record.read_text())
    content["seeds"]["0"]["courses"]["SFT"]["states"][-1]["penalty"] += 1
    record.write_text(json.dumps(content))
    assert demo_page.main(["--check"], root) == 1


def test_a_readme_without_markers_is_left_alone(root: Path) -> None:
    (root / "README.md").write_text("none")
    assert demo_page.main([], root) == 0
    assert (root / "README.md").read_text() == "none"
    (root / "docs" / "accuracy.md").write_text("none")
    with pytest.raises(ValueError, match="expected one of each, in this order"):
        demo_page.main([], root)
