"""Which copy of a weight the penalty sees, where an optimizer trains float32 masters of bfloat16 weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from masters_ranks import penalties_under_mixed_precision
from ranks import needs_fsdp2, run_ranks
from support import random_matrix

STEPS = (1, 10, 40, 100, 400)


def _gradient(weight: Tensor, anchor: rk.Anchor) -> Tensor:
    leaf = weight.detach().clone().requires_grad_()
    rk.accumulate_rotation_grad_(leaf, anchor, 1.0)
    assert leaf.grad is not None
    return leaf.grad.double()


def _errors() -> list[float]:
    """Errors of the gradient at bfloat16 copies of masters that AdamW trains, relative to that at the masters."""
    shape = 512, 384
    pretrained = random_matrix(*shape, torch.bfloat16, scale=0.02)
    anchor = rk.Anchor.from_weight(pretrained, 64, basis_dtype=torch.float32)
    master = pretrained.float().requires_grad_()
    optimizer = torch.optim.AdamW([master], lr=1e-6, weight_decay=0.0)
    task, errors = random_matrix(*shape, seed=1), []
    for step in range(1, STEPS[-1] + 1):
        master.grad = task + 0.5 * random_matrix(*shape, seed=1 + step)
        optimizer.step()
        if step in STEPS:
            exact = _gradient(master, anchor)
            errors.append(float((_gradient(master.bfloat16(), anchor) - exact).norm() / exact.norm()))
    return errors


def test_the_table_of_the_page_is_what_comes_out() -> None:
    page = (Path(__file__).parents[2] / "docs" / "accuracy.md").read_text()
    header = "| steps | " + " | ".join(map(str, STEPS)) + " |"
    row = page.split(header)[1].split("\n")[2]
    with rk.use_backend("torch"):
        found = _errors()
    assert [float(number) for number in re.findall(r"\d\.\d+", row)] == pytest.approx(found, abs=0.01)


@needs_fsdp2
def test_fsdp2_in_mixed_precision_shows_the_masters() -> None:
    """Before the forward pass, between it and the backward pass (which sees gathered copies in bfloat16), and after."""
    for errors in run_ranks(2, penalties_under_mixed_precision):
        assert max(errors) < 1e-3
