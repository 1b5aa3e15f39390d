from __future__ import annotations

from pathlib import Path

import pytest

from rpsft_kernels.demo.experiment import Comparison, Course, State
from rpsft_kernels.demo.knowledge import KnowledgeScore
from rpsft_kernels.demo.plot import plot_comparison
from rpsft_kernels.demo.report import conclusion, format_table
from rpsft_kernels.demo.task import TaskScore
from rpsft_kernels.demo.train import TrainingRun


def state(step: int, accuracy: float, facts: float, fact_loss: float, perplexity: float) -> State:
    task, knowledge = TaskScore(1 - accuracy, accuracy), KnowledgeScore(facts, fact_loss, perplexity)
    return State(step, task, knowledge, penalty=0.5 * step, drift=1e-3 * step)


BEFORE = state(0, 0.0, 0.9, 2.0, 20.0)
GOOD = state(2, 0.8, 0.88, 2.1, 22.0)
BAD = state(2, 0.7, 0.8, 2.5, 30.0)


def comparison(sft: State, rpsft: State, before: State = BEFORE) -> Comparison:
    def course(end: State, seconds: float, of_penalty: list[float]) -> Course:
        return Course(TrainingRun([3.0, 1.0], [0.0, 0.5], [seconds, seconds], of_penalty), [before, end])

    return Comparison(before, course(sft, 1.5, []), course(rpsft, 1.75, [0.25, 0.25]))


def test_table_has_every_measurement_in_its_column() -> None:
    rows = [line.split() for line in format_table(comparison(BAD, GOOD)).splitlines()]
    assert rows[0] == ["before", "SFT", "RPSFT"]
    ends = [row[-3:] for row in rows[2:-2]]
    assert ends == [
        ["1.000", "0.300", "0.200"],
        ["0.0%", "70.0%", "80.0%"],
        ["90.0%", "80.0%", "88.0%"],
        ["2.000", "2.500", "2.100"],
        ["20.00", "30.00", "22.00"],
        ["0", "1", "1"],
        ["0.00e+00", "2.00e-03", "2.00e-03"],
    ]
    assert rows[-2][-2:] == ["1.50", "1.75"]
    assert rows[-1][-2:] == ["penalty's", "0.25"]


@pytest.mark.parametrize(
    ("sft", "rpsft", "expected"),
    [
        (BAD, GOOD, "RPSFT forgot less by facts ranked right, loss of true ends and perplexity of English, compared"),
        (GOOD, BAD, "RPSFT forgot more by facts ranked right, loss of true ends and perplexity of English, compared"),
        (GOOD, GOOD, "RPSFT forgot equally much by facts ranked right, loss of true ends and perplexity of English"),
        (
            BAD,
            state(2, 0.7, 0.7, 2.5, 25.0),
            "RPSFT forgot less by perplexity of English, more by facts ranked right, equally much by loss of true ends",
        ),
        (state(2, 0.8, 0.9, 1.9, 19.0), state(2, 0.8, 0.95, 1.8, 18.0), "nothing to prevent"),
    ],
)
def test_conclusion_goes_where_the_numbers_go(sft: State, rpsft: State, expected: str) -> None:
    assert expected in conclusion(comparison(sft, rpsft))


@pytest.mark.parametrize(
    ("sft", "rpsft", "expected"),
    [
        (GOOD, BAD, "80% after SFT, 70% after RPSFT (both learned)"),
        (GOOD, BEFORE, "80% after SFT, 0% after RPSFT (only SFT learned)"),
        (BEFORE, BAD, "0% after SFT, 70% after RPSFT (only RPSFT learned)"),
        (BEFORE, BEFORE, "(neither learned the task)"),
    ],
)
def test_conclusion_says_which_run_learned(sft: State, rpsft: State, expected: str) -> None:
    assert expected in conclusion(comparison(sft, rpsft))


def test_conclusion_gives_the_change_of_perplexity() -> None:
    assert "by +10.00 with SFT and by +2.00 with RPSFT" in conclusion(comparison(BAD, GOOD))


def test_plot_is_a_png_of_a_legible_size(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_comparison(comparison(BAD, GOOD), "title", path)
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20], "big") >= 1000
    assert int.from_bytes(head[20:24], "big") >= 700


def test_plot_of_a_single_step_without_any_drift(tmp_path: Path) -> None:
    course = Course(TrainingRun([3.0], [0.0], [1.0]), [BEFORE, GOOD])
    plot_comparison(Comparison(BEFORE, course, course), "title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_conclusion_says_what_the_penalty_costs() -> None:
    # The penalty took 0.25 s of a step of 1.75 s, whose rest is 1.5 s.
    assert "The penalty adds 17% to the rest of a step." in conclusion(comparison(BAD, GOOD))
