from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from rpsft_kernels.costs import stretches_of
from rpsft_kernels.ops.triton.schedule import Grid, Schedule, banded_order, build_schedule, splits_of
from rpsft_kernels.tools.models import MODELS
from rpsft_kernels.tools.schedule import schedule_report


def walk(schedule: Schedule) -> list[list[tuple[int, int]]]:
    """(weight, tile) in the order in which each program computes them."""
    programs = []
    for first, last in zip(schedule.starts[:-1], schedule.starts[1:], strict=True):
        runs = schedule.runs[first:last]
        programs.append([(int(w), int(t)) for w, begin, end in runs for t in schedule.order[begin:end]])
    return programs


GRIDS = (Grid(3, 4, 1, 5), Grid(1, 1, 1, 1), Grid(0, 7, 1, 3), Grid(2, 2, 3, 10), Grid(9, 5, 1, 2))


@pytest.mark.parametrize("banded", [False, True])
@pytest.mark.parametrize("programs", [1, 2, 7, 500])
def test_every_tile_is_computed_once(programs: int, banded: bool) -> None:
    schedule = build_schedule(GRIDS, programs, banded)
    counted = Counter(entry for program in walk(schedule) for entry in program)
    expected = {(w, t) for w, grid in enumerate(GRIDS) for t in range(grid.tiles)}
    assert counted == Counter(expected)
    assert schedule.programs == min(programs, len(expected))
    assert all(array.dtype == np.int32 for array in (schedule.starts, schedule.runs, schedule.order))


def test_costs_are_balanced() -> None:
    schedule = build_schedule(GRIDS, 7, False)
    loads = [sum(GRIDS[w].cost for w, _ in program) for program in walk(schedule)]
    assert sum(loads) == schedule.total_cost
    assert max(loads) == schedule.longest_cost
    assert max(loads) - min(loads) <= max(grid.cost for grid in GRIDS)
    assert schedule.filled == pytest.approx(sum(loads) / (7 * max(loads)))


def test_concurrent_programs_hold_neighbouring_tiles() -> None:
    schedule = build_schedule((Grid(4, 3, 1, 1),), 6, False)
    first_wave = [program[0][1] for program in walk(schedule)]
    assert sorted(first_wave) == list(range(6))


def test_an_empty_schedule_launches_nothing() -> None:
    schedule = build_schedule((Grid(0, 3, 1, 1), Grid(2, 0, 1, 1)), 10, True)
    assert schedule.programs_with_work == 0
    assert schedule.filled == 1.0


def test_bands_cover_the_grid_once() -> None:
    order = banded_order(Grid(19, 3, 2, 1))
    assert sorted(order) == list(range(19 * 3 * 2))
    assert order[:9] == [0, 3, 6, 9, 12, 15, 18, 21, 1]


def test_splits_depend_on_the_shape_alone() -> None:
    assert splits_of(4096, 768, 128, 128) == 1
    assert splits_of(4096, 128, 128, 128) == 16
    assert splits_of(100, 16, 32, 32) == 1
    assert splits_of(0, 16, 32, 32) == 1


def test_wide_weights_are_cut_into_stretches() -> None:
    assert [stretches_of(cols) for cols in (0, 1, 14336, 1 << 15, (1 << 15) + 1, 128256)] == [1, 1, 1, 1, 2, 4]


@pytest.mark.parametrize("keep_base", [True, False])
def test_llama_8b_at_the_published_rank(keep_base: bool) -> None:
    """On 132 multiprocessors: at most 200 launches a step, at least 90% of multiprocessor time filled."""
    weights = MODELS["llama-3.1-8b"].weights()
    assert len(weights) == 226
    report = schedule_report(weights, 768, multiprocessors=132, keep_base=keep_base)
    assert report.launches <= 200
    assert report.filled >= 0.90
    assert report.workspace_bytes <= 192 << 20
    assert set(report.filled_by_phase) == {"project", "drift", "pull", "gradient"}


def test_full_anchors_have_no_tiles_to_report() -> None:
    with pytest.raises(ValueError, match=r"shapes: got \(512, 3584\) at rank 768.*full anchors"):
        schedule_report([(512, 3584)], 768)
