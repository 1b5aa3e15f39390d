"""The coefficient of a budget: its steps, and whether it holds R in a small fine-tuning."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import rpsft_kernels as rk
from byte_model import loss_of, pretrained, sources
from rpsft_kernels.training.budget import DualAscent


def test_it_begins_where_the_penalty_is_as_strong_as_the_task() -> None:
    ascent, bound = DualAscent(1e-3), 0.25
    assert ascent.coeff is None
    ascent.update(1.0, bound)
    assert ascent.coeff is None
    ascent.start(3.0, bound)
    # 2 lambda sqrt(R) = ||g|| at R = bound.
    assert ascent.multiplier == 3.0
    # R is 0 now: the coefficient that answers at once is lower.
    assert ascent.coeff == 3.0 * math.exp(-1.5)


@pytest.mark.parametrize(
    ("used", "rate", "response"),
    [(0.0, -0.1, -1.5), (0.5, -0.05, -0.75), (1.0, 0, 0), (1.5, 0.05, 0.75), (9, 0.2, 1.5)],
)
def test_one_update(used: float, rate: float, response: float) -> None:
    ascent, bound = DualAscent(1e-3), 0.5
    ascent.start(1.0, bound)
    first = ascent.multiplier
    assert first is not None
    ascent.update(used * bound, bound)
    assert ascent.multiplier == pytest.approx(first * math.exp(rate), rel=1e-14)
    assert ascent.coeff == pytest.approx(first * math.exp(rate + response), rel=1e-14)


def test_it_does_not_fall_without_end_while_there_is_nothing_to_hold() -> None:
    ascent = DualAscent(1e-3)
    ascent.start(1.0, 0.25)
    for _ in range(1000):
        ascent.update(0.0, 0.25)
    assert ascent.multiplier == 1e-3
    assert DualAscent(1e-3).state() is None
    other = DualAscent(1e-3)
    other.restore(ascent.state())
    other.update(0.3, 0.25)
    ascent.update(0.3, 0.25)
    assert other.state() == ascent.state()


def test_it_does_not_rise_without_end_where_a_budget_cannot_be_held() -> None:
    ascent = DualAscent(1e-3)
    ascent.start(1.0, 0.25)
    for _ in range(1000):
        ascent.update(100.0, 0.25)
    assert ascent.multiplier == 100.0 and ascent.coeff == 100.0 * math.exp(1.5)


@pytest.mark.parametrize("penalty", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(penalty: float) -> None:
    ascent = DualAscent(1e-3)
    ascent.start(1.0, 0.25)
    before = ascent.state()
    with pytest.raises(ValueError, match="R = .* in the step before, expected finite weights"):
        ascent.update(penalty, 0.25)
    assert ascent.state() == before


def _share_of_budget(mode: Any, seed: int, budget: float, steps: int = 220) -> list[float]:
    """Fine-tune, and return R over its bound after each step."""
    model = pretrained()
    penalty = rk.RotationPenalty(rank=8, budget=budget, mode=mode).anchor(model)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    if mode != "gradient":
        rk.attach(optimizer, penalty, model)
    generator = torch.Generator().manual_seed(seed)
    used = []
    for _ in range(steps):
        loss_of(model, sources(), generator).backward()
        if mode == "gradient":
            penalty.add_gradients_(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        used.append(penalty.metrics()["rotation/budget_used"] ** 2)
    return used


@pytest.mark.parametrize(("mode", "seeds"), [("gradient", (1, 2, 3)), ("decoupled", (1,))])
def test_a_fine_tuning_stays_at_its_budget(mode: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        used = _share_of_budget(mode, seed, 0.015)
        mean = sum(used[-100:]) / 100
        assert abs(mean - 1) < 0.1, (mode, seed, mean)
        assert max(used) < 2, (mode, seed, max(used))


def test_the_budget_binds() -> None:
    """Without the penalty, R would be many times as much: the test above holds something."""
    model = pretrained()
    anchors = rk.Anchors.from_model(model, 8, progress=False)
    energy = rk.RotationPenalty(anchors=anchors).anchor(model).state_dict()["energy"]
    assert float(rk.rotation_penalty(model, anchors)) == 0
    optimizer, generator = torch.optim.AdamW(model.parameters(), 2e-3), torch.Generator().manual_seed(1)
    for _ in range(130):
        loss_of(model, sources(), generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert float(rk.rotation_penalty(model, anchors)) > 5 * 0.015**2 * energy
