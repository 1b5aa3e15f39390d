from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import rpsft_kernels as rk
from rpsft_kernels.demo.batch import Example
from rpsft_kernels.demo.train import (
    Settings,
    TrainingRun,
    copy_parameters,
    fine_tune,
    relative_drift,
    restore_parameters,
    schedule_rate,
)

EXAMPLES = [Example((i, i + 1, 7), (2 * i + 3, 5)) for i in range(40)]
SETTINGS = Settings(steps=10, batch=4, lr=1e-2)


def tuned(model: PreTrainedModel, anchors: rk.Anchors, coeff: float | None) -> TrainingRun:
    return fine_tune(model, anchors, EXAMPLES, SETTINGS, coeff, "test", lambda step: None)


def test_without_penalty_it_is_the_plain_loop(tiny: PreTrainedModel, anchors: rk.Anchors) -> None:
    start = copy_parameters(tiny)
    run = tuned(tiny, anchors, None)
    trained = copy_parameters(tiny)

    restore_parameters(tiny, start)
    optimizer = torch.optim.AdamW(tiny.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    losses = []
    for step in range(10):
        rows = EXAMPLES[4 * step : 4 * step + 4]
        ids = torch.tensor([e.prompt + e.answer for e in rows])
        logits = tiny(ids).logits[:, 2:-1].flatten(0, 1)
        loss = cross_entropy(logits, ids[:, 3:].flatten())
        optimizer.param_groups[0]["lr"] = 1e-2 * schedule_rate(step, 10)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert run.losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < 0.8 * losses[0]
    for name, parameter in tiny.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-3, atol=1e-4)


def test_a_penalty_of_weight_zero_changes_nothing(tiny: PreTrainedModel, anchors: rk.Anchors) -> None:
    start = copy_parameters(tiny)
    plain = tuned(tiny, anchors, None)
    weights = copy_parameters(tiny)
    restore_parameters(tiny, start)
    weightless = tuned(tiny, anchors, 0.0)
    assert plain.losses == weightless.losses
    assert plain.penalties == [] and len(weightless.penalties) == 10
    assert all(torch.equal(p, weights[name]) for name, p in tiny.named_parameters())


def test_autocast_computes_in_bfloat16_and_keeps_the_weights(tiny: PreTrainedModel, anchors: rk.Anchors) -> None:
    start = copy_parameters(tiny)
    exact = tuned(tiny, anchors, None)
    restore_parameters(tiny, start)
    rounded = fine_tune(
        tiny, anchors, EXAMPLES, dataclasses.replace(SETTINGS, autocast=True), None, "test", lambda step: None
    )
    assert all(p.dtype == torch.float32 for p in tiny.parameters())
    assert rounded.losses != exact.losses
    assert rounded.losses == pytest.approx(exact.losses, rel=0.05)


def test_two_runs_are_bitwise_equal(tiny: PreTrainedModel, anchors: rk.Anchors) -> None:
    start = copy_parameters(tiny)
    first = tuned(tiny, anchors, 0.5)
    weights = copy_parameters(tiny)
    restore_parameters(tiny, start)
    second = tuned(tiny, anchors, 0.5)
    assert (first.losses, first.penalties) == (second.losses, second.penalties)
    assert all(torch.equal(p, weights[name]) for name, p in tiny.named_parameters())


def test_the_penalty_is_recorded_and_held_down(tiny: PreTrainedModel, anchors: rk.Anchors) -> None:
    start = copy_parameters(tiny)
    free = tuned(tiny, anchors, 0.0)
    with torch.no_grad():
        end = rk.rotation_penalty(tiny, anchors).item()
    restore_parameters(tiny, start)
    held = tuned(tiny, anchors, 30.0)
    with torch.no_grad():
        held_end = rk.rotation_penalty(tiny, anchors).item()
    assert free.penalties[0] == held.penalties[0] == 0
    # Both runs take the same first step: at the anchor the penalty's gradient is exactly 0.
    assert free.penalties[1] == held.penalties[1] > 0
    assert end > free.penalties[1]
    assert held_end < 0.2 * end


@pytest.mark.usefixtures("reference_arithmetic")
def test_penalty_is_the_papers_formula(tiny: PreTrainedModel, anchors: rk.Anchors) -> None:
    start = copy_parameters(tiny)
    seen: list[float] = []

    def record(step: int) -> None:
        total = 0.0
        for name, parameter in tiny.named_parameters():
            if name in anchors:
                anchor, moved = anchors[name], parameter.detach().double() - start[name].double()
                assert anchor.left is not None
                assert anchor.right is not None
                drift = anchor.left.double().T @ moved @ anchor.right.double()
                total += drift.square().sum().item()
        seen.append(total)

    run = fine_tune(tiny, anchors, EXAMPLES, SETTINGS, 0.5, "test", record)
    assert len(seen) == len(run.seconds) == 10
    assert run.penalties[1:] == pytest.approx(seen[:-1], rel=1e-3)
    assert run.seconds_per_step > run.penalty_seconds_per_step > 0
    assert len(run.penalty_seconds) == 10 and run.penalty_share > 0


def test_rate_rises_over_a_tenth_and_falls_to_zero() -> None:
    assert [schedule_rate(step, 20) for step in (0, 1, 2, 11, 19)] == pytest.approx([0.5, 1, 1, 0.5, 1 / 18])
    assert schedule_rate(0, 1) == 1


def test_drift_is_that_of_all_parameters_together(tiny: PreTrainedModel) -> None:
    saved = copy_parameters(tiny)
    assert relative_drift(tiny, saved) == 0
    with torch.no_grad():
        for parameter in tiny.parameters():
            parameter.mul_(1.01)
    assert relative_drift(tiny, saved) == pytest.approx(0.01, rel=1e-4)
