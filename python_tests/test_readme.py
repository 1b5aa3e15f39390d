"""The README's examples run as they are written, and its figures are those of the pages that say how they were made."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def _penalty(block: str) -> float:
    names: dict[str, object] = {}
    exec(compile(block, str(README), "exec"), names)
    penalty = names["R"]
    assert isinstance(penalty, torch.Tensor)
    return penalty.item()


def test_the_first_example_runs() -> None:
    assert _penalty(_blocks()[0]) > 0


def test_the_table_of_accuracy_is_the_page_s() -> None:
    """Errors of the published formula, and the range of this package's."""
    rows = re.findall(r"^\| (\d+) \| ([\d.]+ / [\d.]+) \| ([\d.]+) to ([\d.]+) \|$", README.read_text(), re.M)
    assert [steps for steps, *_ in rows] == ["1", "10", "40"]
    page = (README.parent / "docs" / "accuracy.md").read_text()
    for steps, published, least, most in rows:
        (line,) = re.findall(rf"^\| {steps} \| .*$", page, re.M)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        errors = cells[-1].split(", ")
        assert cells[2] == published and (min(errors), max(errors)) == (least, most)


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 150
