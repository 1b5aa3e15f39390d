from __future__ import annotations

from pathlib import Path

import pytest

from rpsft_kernels.demo.experiment import Comparison, Course, State
from rpsft_kernels.demo.knowledge import KnowledgeScore
from rpsft_kernels.demo.plot import plot_comparison
from rpsft_kernels.demo.record import read_record, write_record
from rpsft_kernels.demo.report import conclude, format_markdown, format_pairs, format_table
from rpsft_kernels.demo.task import TaskScore
from rpsft_kernels.demo.train import TrainingRun


def state(accuracy: float, divergence: float, step: int = 2) -> State:
    knowledge = KnowledgeScore(divergence, 20 + 100 * divergence, 3 + divergence, 0.9 - divergence)
    return State(step, TaskScore(1 - accuracy, accuracy), knowledge, penalty=0.5 * step, drift=1e-3 * step)


BEFORE = state(0.0, 0.0, step=0)


def course(end: State, seconds: float = 1.5, of_penalty: float | None = None) -> Course:
    penalties = [] if of_penalty is None else [0.0, 0.5]
    return Course(
        TrainingRun([3.0, 1.0], penalties, [seconds] * 2, [] if of_penalty is None else [of_penalty] * 2), [BEFORE, end]
    )


def comparison(sft: State, rpsft: State, random: State) -> Comparison:
    courses = {"SFT": course(sft), "RPSFT": course(rpsft, 1.75, 0.25), "random": course(random, 2.0, 0.5)}
    return Comparison(BEFORE, courses)


USUAL = comparison(state(0.7, 0.08), state(0.8, 0.04), state(0.75, 0.05))


def test_table_has_every_measurement_in_its_column() -> None:
    rows = [line.split() for line in format_table(USUAL).splitlines()]
    assert rows[0] == ["before", "SFT", "RPSFT", "random"]
    assert [row[-4:] for row in rows[2:-2]] == [
        ["1.000", "0.300", "0.200", "0.250"],
        ["0.0%", "70.0%", "80.0%", "75.0%"],
        ["0.0000", "0.0800", "0.0400", "0.0500"],
        ["20.00", "28.00", "24.00", "25.00"],
        ["3.00", "3.08", "3.04", "3.05"],
        ["90.0%", "82.0%", "86.0%", "85.0%"],
        ["0", "1", "1", "1"],
        ["0.00e+00", "2.00e-03", "2.00e-03", "2.00e-03"],
    ]
    assert rows[-2][-3:] == ["1.50", "1.75", "2.00"]
    assert rows[-1][-3:] == ["penalty's", "0.25", "0.50"]


def test_markdown_has_the_cells_of_the_table() -> None:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_markdown(USUAL).splitlines()]
    assert all(len(line) == 5 for line in lines) and lines[1] == ["---"] * 5
    text = format_table(USUAL).splitlines()
    assert [" ".join(line).split() for line in (lines[0], *lines[2:])] == [
        line.split() for line in (text[0], *text[2:])
    ]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (
            (0.08, 0.04, 0.05),
            "RPSFT against SFT: KL of English 0.0400 instead of 0.0800 (-50%), loss of the facts' true",
        ),
        ((0.08, 0.04, 0.05), "random against SFT: KL of English 0.0500 instead of 0.0800 (-38%)"),
        (
            (0.08, 0.04, 0.05),
            "have 75% of the effect that the singular ones have on it: most of what the penalty does ",
        ),
        ((0.08, 0.04, 0.05), "comes from how much of each weight it holds, whichever directions."),
        (
            (0.08, 0.04, 0.07),
            "have 25% of the effect that the singular ones have on it: most of what the penalty does ",
        ),
        ((0.08, 0.04, 0.07), "comes from the choice of directions."),
        ((0.08, 0.04, 0.09), "have -25% of the effect"),
        ((0.08, 0.09, 0.05), "RPSFT moved English hardly less than SFT, or more: no effect to attribute"),
        ((0.08, 0.075, 0.05), "RPSFT moved English hardly less than SFT, or more: no effect to attribute"),
        ((0.0, 0.0, 0.0), "RPSFT against SFT: KL of English 0.0000 instead of 0.0000, loss"),
    ],
)
def test_conclusion_goes_where_the_numbers_go(ends: tuple[float, float, float], expected: str) -> None:
    sft, rpsft, random = (state(0.7, divergence) for divergence in ends)
    if ends == (0.0, 0.0, 0.0):
        assert expected in conclude(Comparison(BEFORE, {"SFT": course(sft), "RPSFT": course(rpsft, 2.0, 0.5)}), 128, 75)
    else:
        assert expected in conclude(comparison(sft, rpsft, random), 128, 75)


@pytest.mark.parametrize(
    ("accuracies", "expected"),
    [
        ((0.7, 0.8, 0.75), "All learned the task."),
        ((0.7, 0.0, 0.75), "Only SFT and random learned the task."),
        ((0.0, 0.1, 0.0), "Only RPSFT learned the task."),
        ((0.0, 0.0, 0.0), "None learned the task."),
    ],
)
def test_conclusion_says_which_arms_learned(accuracies: tuple[float, float, float], expected: str) -> None:
    assert expected in conclude(comparison(*(state(accuracy, 0.1) for accuracy in accuracies)), 128, 75)


def test_conclusion_says_what_a_seed_can_tell_and_what_the_penalty_costs() -> None:
    said = conclude(USUAL, held_out=128, facts=75)
    # sqrt(0.25 / 128) and sqrt(0.25 / 75).
    assert "shares of 128 sums and of 75 facts have standard errors of up to 4 and 6 points" in said
    # 0.25 s of a step of 1.75 s, whose rest is 1.5 s; 0.5 s of 2 s.
    assert "The penalty's cost: RPSFT adds 17% to the rest of a step, random adds 33% to the rest of a step." in said


def test_conclusion_of_a_single_arm() -> None:
    said = conclude(Comparison(BEFORE, {"SFT": course(state(0.7, 0.1))}), 128, 75)
    assert "against" not in said and "cost" not in said and "andom" not in said and "All learned" in said


def test_pairs_of_seeds_are_compared_with_each_other() -> None:
    other = comparison(state(0.7, 0.10), state(0.8, 0.04), state(0.75, 0.05))
    lines = format_pairs({0: USUAL, 3: other}).splitlines()
    assert lines[1] == "  RPSFT, KL of English: -0.0400, -0.0600; mean -0.0500, standard error 0.0100"
    assert lines[4].startswith("  random, KL of English: -0.0300, -0.0500; mean -0.0400")
    assert format_pairs({0: USUAL}) == ""
    assert format_pairs({s: Comparison(BEFORE, {"RPSFT": USUAL.courses["RPSFT"]}) for s in (0, 1)}) == ""


def test_records_come_back(tmp_path: Path) -> None:
    write_record(tmp_path / "demo.json", {"title": "a"}, {5: USUAL, 2: USUAL})
    run, comparisons = read_record(tmp_path / "demo.json")
    assert run == {"title": "a"} and list(comparisons) == [5, 2] and comparisons[2] == USUAL


def test_plot_is_a_png_of_a_legible_size(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_comparison(USUAL, "title", path)
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    assert int.from_bytes(head[16:20], "big") >= 1000
    assert int.from_bytes(head[20:24], "big") >= 700


def test_plot_of_a_single_step_without_any_drift(tmp_path: Path) -> None:
    still = Course(TrainingRun([3.0], [0.0], [1.0]), [BEFORE, BEFORE])
    plot_comparison(Comparison(BEFORE, {"SFT": still, "RPSFT": still}), "title", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
