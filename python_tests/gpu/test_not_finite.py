"""A NaN or an infinity in a weight shows in R and in that weight's gradient, wherever it lies, and nowhere else."""

from __future__ import annotations

import itertools

import pytest
import torch

from filling import Case, make_inputs, step

# Whole tiles, ragged edges and both orientations in one launch.
SHAPES = ((384, 640), (200, 136), (640, 384), (131, 259))
CASES = tuple(
    Case(form, dtype, layout, rank=72)  # type: ignore[arg-type]
    for form, dtype, layout in itertools.product(
        ("base", "block", "full"), (torch.bfloat16, torch.float16, torch.float32), ("contiguous", "sliced")
    )
)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_shows(case: Case, value: float, device: torch.device) -> None:
    inputs = make_inputs(case, SHAPES, device)
    clean = [t.clone() for t in (*step(inputs)[0], *inputs.grads)]
    for sick, (m, n) in enumerate(SHAPES):
        for row, col in ((0, 0), (m - 1, n - 1), (m // 2, n - 1)):
            weight = inputs.weights[sick]
            held = weight[row, col].clone()
            weight[row, col] = value
            drifts, squares = step(inputs)
            weight[row, col] = held
            finite = squares.isfinite().tolist()
            assert finite == [i != sick for i in range(len(SHAPES))], (sick, row, col)
            assert not bool(inputs.grads[sick].isfinite().all()), (sick, row, col)
            for i, (one, other) in enumerate(zip(clean, [*drifts, *inputs.grads], strict=True)):
                if i % len(SHAPES) != sick:
                    assert torch.equal(one, other), (sick, row, col, i)
