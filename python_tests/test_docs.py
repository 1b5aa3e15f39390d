"""The pages are right about the repository: links, paths, targets, environment variables, versions."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from rpsft_kernels.tools.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
ENVIRONMENT = ROOT / "docs" / "environment.md"
# The first folder of what can be named by its path from the root.
_ROOMS = r"rpsft_kernels|csrc|python_tests|benchmarks|build_tools|examples|docs|\.ci"
# Files that a build or a run makes.
_MADE = ("rpsft_kernels/kernels", "rpsft_kernels/_native_build.txt")


def _anchors(page: Path) -> set[str]:
    """Fragments that lead to a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        name, _, fragment = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not fragment or fragment in _anchors(linked), target


# The changelog is left out: it may name files that are gone.
@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    for path in re.findall(rf"(?<![\w/.-])((?:{_ROOMS})/[\w./*-]*\w)", page.read_text()):
        if not path.startswith(_MADE):
            assert list(ROOT.glob(path)), path


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    corners = re.search(r"^CORNERS := (.*)$", makefile, re.M)
    assert corners is not None
    known = {*re.findall(r"^([\w .-]+?):(?!=)", makefile, re.M), *(f"test-{name}" for name in corners[1].split())}
    known = {target for targets in known for target in targets.split()}
    for target in re.findall(r"(?:^    |`)(?:[A-Z_]+=\S+ )*make ([a-z][\w.-]*\w)", page.read_text(), re.M):
        assert target in known, target


def test_every_environment_variable_has_a_row() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", ENVIRONMENT.read_text(), re.M)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    read: set[str] = set()
    for path in (ROOT / "setup.py", *(ROOT / "build_tools").glob("*.py"), *(ROOT / "rpsft_kernels").rglob("*.py")):
        source = path.read_text()
        read |= set(re.findall(r"\bRPSFT_[A-Z_]+\b", source))
        read |= set(re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", source))
    assert read - listed == set()
    assert {name for name in listed if name.startswith("RPSFT_")} <= read


def test_the_schedule_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "performance.md").read_text()
    shown = re.search(r"^    \$ python -m rpsft_kernels (schedule .*)\n((?:    .*\n)+)", page, re.M)
    assert shown is not None
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == textwrap.dedent(shown[2])


def _pins(name: str) -> dict[str, str]:
    """The versions that a file of requirements names."""
    lines = (ROOT / name).read_text().splitlines()
    return dict(reversed([match.groups() for line in lines if (match := re.match(r"(\w+)==([\w.]+)", line))]))


def test_the_table_of_versions_is_what_is_tested() -> None:
    text = ENVIRONMENT.read_text()
    rows = re.findall(r"^\| (Python|torch|Triton|numpy) \|(.*)\|$", text, re.M)
    table = {name.lower(): [cell.strip() for cell in cells.split("|")] for name, cells in rows}
    assert set(table) == {"python", "torch", "triton", "numpy"}
    project = (ROOT / "pyproject.toml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    heading = re.search(r"^\| \| supported \|(.*)\|$", text, re.M)
    assert heading is not None
    targets = re.findall(r"`make test(?:-([\w.-]+))?`", heading[1])
    assert targets[0] == "oldest" and targets[-1] == ""
    for name, (supported, *versions) in table.items():
        floor = re.search(rf'"{name}>=([\d.]+)', project) or re.search(r'requires-python = ">=([\d.]+)"', project)
        assert floor is not None and supported.startswith(f"{floor[1]} and newer")
        # The oldest that is supported is the oldest that is tested.
        assert (versions[0] + ".").startswith(f"{floor[1]}.")
        for target, version in zip(targets, versions, strict=True):
            if name == "python":
                assert not target or re.search(rf"^PYTHON_{re.escape(target)} := {re.escape(version)}$", makefile, re.M)
            else:
                pins = _pins(f"requirements-{target or 'dev'}.txt")
                assert pins.get(name, "none" if name == "triton" else "not pinned") == version


def test_continuous_integration_runs_the_table() -> None:
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    corners = re.search(r"^CORNERS := (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert corners is not None
    assert {"make test", *(f"make test-{name}" for name in corners[1].split())} <= set(commands)
