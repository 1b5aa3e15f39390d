"""Measured times beside predicted ones: none can be taken for the other, and the pages say the same."""

from __future__ import annotations

import re
from dataclasses import astuple
from pathlib import Path

import pytest

from rpsft_kernels.tools.cli import main
from rpsft_kernels.tools.gpus import GPUS
from rpsft_kernels.tools.measured import H200, LOOP, ON_H200, Measurement, beside_predicted
from rpsft_kernels.tools.models import MODELS
from rpsft_kernels.tools.predict import predict
from rpsft_kernels.tools.roofline import Job

DOCS = Path(__file__).resolve().parents[2] / "docs"
TITLES = {"llama-3.1-8b": "Llama-3.1-8B", "llama-3.2-1b": "Llama-3.2-1B", "qwen2.5-0.5b": "Qwen2.5-0.5B"}


@pytest.mark.parametrize("each", ON_H200, ids=lambda each: f"{each.model}-{each.commit}".replace(" ", "-"))
def test_the_pages_say_the_same(each: Measurement) -> None:
    page = DOCS / ("hopper.md" if each.how == LOOP else "performance.md")
    title = rf"^\| {TITLES[each.model]}( whole)?, k = {each.rank}, bfloat16 \|"
    (row,) = (line for line in page.read_text().splitlines() if re.match(title, line))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # The last column of the one, the replayed time of the other.
    shown = cells[-1] if each.how == LOOP else cells[1].split(", ")[1]
    assert float(shown) == each.milliseconds
    assert sum(each.phases.values()) < each.milliseconds


def test_the_machine_and_the_commit_are_those_of_the_page() -> None:
    text = " ".join((DOCS / "performance.md").read_text().split())
    for fact in (*astuple(H200), "as of commit 3517052"):
        assert fact in text, fact
    assert {each.commit.removeprefix("before ") for each in ON_H200} == {"3517052"}


def test_every_row_says_which_kernels_it_is_of() -> None:
    head, *rows = beside_predicted().splitlines()
    assert head.split() == ["model", "k", "kernels", "commit", "project", "drift", "pull", "gradient", "rest", "sum"]
    assert len(rows) == len(ON_H200) + 3
    assert len(set(map(len, [head, *rows]))) == 1
    predicted = [row for row in rows if "predicted" in row]
    assert [row.split()[0] for row in predicted] == list(TITLES)
    assert all("specialised, predicted" in row and "this one" in row and "measured" not in row for row in predicted)
    measured = [row for row in rows if row not in predicted]
    for row, each in zip(measured, ON_H200, strict=True):
        assert "plain, measured" in row and f"{each.how} " in row and f" {each.commit} " in row
        assert float(row.split()[-1]) == each.milliseconds
    assert re.search(r"before 3517052 +23\.00 +2\.00 +4\.80 +25\.30 +2\.70 +57\.80$", measured[1])


def test_the_prediction_beside_them_is_that_of_the_same_job() -> None:
    only = Measurement("qwen2.5-0.5b", 64, "0000000", LOOP, 1.0)
    _, predicted, measured = beside_predicted([only]).splitlines()
    prediction = predict(Job(MODELS["qwen2.5-0.5b"].weights(), 64, GPUS["h200"]))
    assert float(predicted.split()[-1]) == pytest.approx(1e3 * prediction.total, abs=0.005)
    cells = [float(cell) for cell in predicted.split()[-6:]]
    assert sum(cells[:-1]) == pytest.approx(cells[-1], abs=0.03)
    assert measured.split()[-6:] == ["-", "-", "-", "-", "-", "1.00"]


def test_the_command_prints_them_for_an_h200_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--model", "smollm2-135m", "--rank", "64", "--gpu", "h200"]) == 0
    printed = capsys.readouterr().out
    assert beside_predicted() in printed
    assert f"measured with the plain kernels of earlier ones ({H200})" in printed
    assert "predicted for the kernels of this commit, which were not measured" in printed
    assert main(["roofline", "--model", "smollm2-135m", "--rank", "64", "--gpu", "h100"]) == 0
    assert "measured" not in capsys.readouterr().out
