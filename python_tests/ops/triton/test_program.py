"""Runs of a program: one send for all that is staged, scratch memory that others move, streams and threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from rpsft_kernels.ops import Operands, open_run, reference
from rpsft_kernels.ops.triton import launch as triton_launch
from rpsft_kernels.ops.triton import program as programs
from rpsft_kernels.ops.triton import table as tables
from rpsft_kernels.ops.triton import upload
from rpsft_kernels.ops.triton.program import TritonProgram
from rpsft_kernels.ops.triton.variants import Variant
from support import Form, Problem, make_problem, operands_of

SMALL = ((9, 20, 4), (20, 9, 4))
LARGE = ((70, 40, 20), (40, 70, 20), (33, 140, 20))


def operands(
    shapes: Sequence[tuple[int, int, int]], form: Form = "base", seed: int = 0, device: torch.device | None = None
) -> Operands:
    found: list[Problem] = [
        make_problem(form, (m, n), k, torch.float32, seed=seed + i, device=device or torch.device("cpu"))
        for i, (m, n, k) in enumerate(shapes)
    ]
    return operands_of(found)


def check_step(program: TritonProgram, given: Operands, grow: Callable[[], None] = lambda: None) -> None:
    """Project and pull back in one run, against plain torch; ``grow`` comes between sending and queueing."""
    drifts, squares = reference.project_drift(given)
    grads = [torch.ones_like(weight) for weight in given.weights]
    expected = [grad.clone() for grad in grads]
    scales = [0.5 + i for i in range(len(grads))]
    reference.pull_back_into(expected, given.for_pull_back(), drifts, torch.tensor(scales), True)
    with open_run(program) as run:
        run.stage_projection(0, given, keep=False)
        pull = run.stage_pull_back(0, range(len(grads)), given.for_pull_back(), grads, scales, True)
        run.send()
        grow()
        with run.turn():
            assert run.project(0) == []
            run.pull_back_(pull)
        torch.testing.assert_close(run.squares_of(0), squares, rtol=0.02, atol=1e-5)
    for grad, exact in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, exact, rtol=0.02, atol=1e-2)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows of all copies of a table."""
    found: list[int] = []

    def copy_rows(source: Any, target: Tensor) -> None:
        found.append(len(source))
        upload.copy_rows(source, target)

    monkeypatch.setattr(tables, "copy_rows", copy_rows)
    return found


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Variant]:
    """Launches that a kernel was looked for."""
    found: list[Variant] = []
    find = triton_launch.find_start

    def find_start(variant: Variant, *rest: Any) -> Callable[[], None]:
        found.append(variant)
        return find(variant, *rest)

    monkeypatch.setattr(triton_launch, "find_start", find_start)
    return found


def test_all_that_is_staged_is_sent_at_once(device: torch.device, sent: list[int]) -> None:
    batches = [operands(SMALL, device=device), operands(LARGE, device=device), operands(SMALL, "full", device=device)]
    program = TritonProgram(device, [len(each.weights) for each in batches])
    for turn in range(3):
        with open_run(program) as run:
            pulls = []
            grads = [[torch.zeros_like(weight) for weight in each.weights] for each in batches]
            for i, each in enumerate(batches):
                run.stage_projection(i, each, keep=False)
                places, scales = range(len(grads[i])), [1.0] * len(grads[i])
                pulls.append(run.stage_pull_back(i, places, each.for_pull_back(), grads[i], scales, True))
            run.send()
            for i, pull in enumerate(pulls):
                run.project(i)
                run.pull_back_(pull)
        if turn == 0:
            assert sent == [sum(2 * len(each.weights) for each in batches)]
            sent.clear()
        else:
            # Gradients at other addresses, perhaps; nothing else.
            assert len(sent) <= 1
            sent.clear()


def test_scratch_memory_that_another_program_moves_is_found_again(
    device: torch.device, prepared: list[Variant]
) -> None:
    """Between what a run has sent and what it queues: its launches are made anew."""
    one, other = TritonProgram(device, [len(SMALL)]), TritonProgram(device, [len(LARGE)])
    small, large = operands(SMALL, device=device), operands(LARGE, device=device)
    check_step(one, small)
    asked = len(prepared)

    def grow() -> None:
        del prepared[:]
        check_step(other, large)
        del prepared[:]

    check_step(one, small, grow)
    assert len(prepared) == asked, "once more, all of them"
    # Now it is as large as either needs.
    check_step(one, small, lambda: check_step(other, large))
    assert len(prepared) == asked


def test_a_step_that_is_run_again_prepares_nothing(device: torch.device, prepared: list[Variant]) -> None:
    program, given = TritonProgram(device, [len(LARGE)]), operands(LARGE, device=device)
    check_step(program, given)
    assert prepared
    del prepared[:]
    for _ in range(2):
        check_step(program, given)
        assert prepared == []
    # Other weights, of the same anchors.
    moved = [weight * 1.5 for weight in given.weights]
    check_step(program, given._replace(weights=moved))
    assert prepared == []


def test_runs_at_a_time_have_tables_and_squares_of_their_own(device: torch.device) -> None:
    program = TritonProgram(device, [len(SMALL)])
    one, other = operands(SMALL, device=device), operands(SMALL, seed=9, device=device)
    with open_run(program) as first, open_run(program) as second:
        assert first is not second
        for run, given in ((first, one), (second, other)):
            run.stage_projection(0, given, keep=True)
        first.send()
        second.send()
        found = [(run.project(0), run.squares_of(0)) for run in (first, second)]
    for (drifts, squares), given in zip(found, (one, other), strict=True):
        expected, totals = reference.project_drift(given)
        torch.testing.assert_close(squares, totals, rtol=0.02, atol=1e-5)
        for drift, exact in zip(drifts, expected, strict=True):
            torch.testing.assert_close(drift, exact, rtol=0.02, atol=1e-3)
    with open_run(program) as again:
        assert again in (first, second), "they are used again"


def test_another_profile_makes_other_launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is after a driver has refused the kernels of a tile table."""
    program = TritonProgram(device, [len(SMALL)])
    with open_run(program) as first:
        pass
    profile = programs.devices.device_profile(device)
    with open_run(program) as second:
        assert second is first
    changed = programs.devices.Profile(profile.architecture, profile.multiprocessors + 1, profile.descriptors)
    monkeypatch.setattr(programs.devices, "device_profile", lambda _: changed)
    with open_run(program) as third:
        assert third is not first


def test_drifts_that_are_kept_are_in_memory_of_their_own(device: torch.device) -> None:
    program, given = TritonProgram(device, [len(LARGE)]), operands(LARGE, device=device)
    expected, _ = reference.project_drift(given)
    with open_run(program) as run:
        run.stage_projection(0, given, keep=True)
        run.send()
        kept = run.project(0)
    check_step(program, given._replace(weights=[weight * 3 for weight in given.weights]))
    assert all(drift.data_ptr() % 16 == 0 for drift in kept)
    for drift, exact in zip(kept, expected, strict=True):
        torch.testing.assert_close(drift, exact, rtol=0.02, atol=1e-2)


def test_one_step_of_the_public_functions_is_one_send(device: torch.device, sent: list[int]) -> None:
    weights = [torch.randn(24, 40, device=device).requires_grad_() for _ in range(3)]
    weights.append(torch.randn(40, 24, dtype=torch.bfloat16, device=device).requires_grad_())
    anchors = [rk.Anchor.from_weight(weight.detach(), 4) for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight *= 1.01
    with rk.use_backend("triton"):
        for existing in (False, True):
            del sent[:]
            rk.accumulate_rotation_grad_(weights, anchors, 0.5)
            assert len(sent) == 1, existing
        del sent[:]
        rk.accumulate_rotation_grad_(weights, anchors, 0.5)
        assert sent == [], "the same tensors and the same coefficient"
        rk.accumulate_rotation_grad_(weights, anchors, 0.25)
        assert len(sent) == 1, "another coefficient"
