"""Launches that fill the GPU: right against float64, and the same bits however often and beside whatever they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from filling import SHAPES, Case, Inputs, findings, make_inputs, step

TIMES = 24
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = (
    *(Case("base", dtype, layout) for dtype in (BF16, FP16, FP32) for layout in ("contiguous", "transposed", "sliced")),
    Case("base", rank=128),
    Case("base", rank=129),
    Case("base", layout="padded", rank=129),
    Case("base", FP32, base=BF16),
    Case("base", BF16, base=FP32),
    Case("base", FP16, base=BF16),
    Case("base", grad=FP32),
    Case("base", basis=FP32, rank=128),
    *(Case("block", dtype) for dtype in (BF16, FP16, FP32)),
    Case("block", layout="transposed", rank=128),
    Case("block", basis=FP32, rank=128),
    *(Case("full", dtype) for dtype in (BF16, FP16, FP32)),
    Case("full", FP32, base=BF16, layout="transposed"),
    Case("full", layout="sliced", grad=FP32),
)


class Noise:
    """Work on a stream of its own, which takes multiprocessors, cache and bandwidth from what runs beside it."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.matrix = torch.ones(2048, 2048, dtype=BF16, device=device)

    def make(self) -> None:
        with torch.cuda.stream(self.stream):
            self.matrix @ self.matrix


def results(inputs: Inputs) -> list[Tensor]:
    drifts, squares = step(inputs)
    return [*drifts, squares, *(grad.clone() for grad in inputs.grads)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_right_and_the_same_bits_every_time(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, SHAPES, device)
    first = results(inputs)
    drifts, squares = first[: len(SHAPES)], first[len(SHAPES)]
    assert list(findings(case, inputs, drifts, squares)) == []
    noise, different = Noise(device), torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(TIMES):
        if turn % 2:
            noise.make()
        for one, other in zip(first, results(inputs), strict=True):
            # Counted where it lies: a wait between launches would keep them from crowding each other.
            different += (one != other).sum()
    assert int(different) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_exactly_zero_at_the_anchor_every_time(case: Case, device: torch.device) -> None:
    inputs = make_inputs(case, SHAPES, device, drift=0.0)
    noise, nonzero = Noise(device), torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(TIMES):
        if turn % 2:
            noise.make()
        drifts, squares = step(inputs)
        for drift in drifts:
            nonzero += drift.count_nonzero()
        nonzero += squares.count_nonzero()
        for grad, before in zip(inputs.grads, inputs.before, strict=True):
            nonzero += (grad != before).sum()
    assert int(nonzero) == 0
