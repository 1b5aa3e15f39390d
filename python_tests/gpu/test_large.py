"""A weight of more than 2^31 elements, whose last rows no 32-bit offset reaches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rpsft_kernels import ops

# One at a time: each takes 13 GB of the GPU.
pytestmark = pytest.mark.xdist_group("large")
_NEEDED = 20 << 30
SHORT, LONG = 33_000, 65_544
RANK = 72
ROWS = 1 << 9


def blocks_of(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


def make_filled(rows: int, cols: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """W0 and a W that has moved from it, in bfloat16."""
    generator = torch.Generator(device).manual_seed(rows)
    base = torch.empty(rows, cols, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    weight = torch.empty_like(base)
    for block in blocks_of(rows):
        step = torch.empty(base[block].shape, device=device).normal_(0, 1e-3, generator=generator)
        weight[block] = base[block] + step
    return weight, base


def basis(rows: int, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(rows + 1)
    columns = torch.empty(rows, RANK, device=device).normal_(generator=generator)
    orthonormal: Tensor = torch.linalg.qr(columns).Q
    return orthonormal.to(torch.bfloat16).contiguous()


@pytest.mark.parametrize("shape", [(SHORT, LONG), (LONG, SHORT)], ids=["wide", "tall"])
def test_every_element_counts(shape: tuple[int, int], device: torch.device) -> None:
    free, _ = torch.cuda.mem_get_info(device)
    if free < _NEEDED:
        pytest.skip(f"needs {_NEEDED >> 30} GiB of free GPU memory, and there are {free >> 30}")
    rows, cols = shape
    assert rows * cols > 2**31
    weight, base = make_filled(rows, cols, device)
    left, right = basis(rows, device), basis(cols, device)
    (drift,), squares = ops.project_drift(ops.Operands([weight], [left], [right], [base]), "triton")
    exact = torch.zeros(RANK, RANK, dtype=torch.float64, device=device)
    for block in blocks_of(rows):
        exact += left[block].double().T @ ((weight[block].double() - base[block].double()) @ right.double())
    assert float((drift.double() - exact).norm()) <= 2.0**-8 * float(exact.norm())
    torch.testing.assert_close(squares[0].double(), drift.double().square().sum(), rtol=1e-5, atol=0.0)

    grad = torch.zeros_like(weight)
    ops.pull_back_(
        [grad],
        ops.Operands(lefts=[left], rights=[right]),
        [drift],
        torch.full((1,), 2.0, device=device),
        True,
        "triton",
    )
    for block in blocks_of(rows):
        pulled = 2.0 * (left[block].double() @ drift.double()) @ right.double().T
        # Every block of rows on its own: an error in the last ones would be lost in the norm of the whole.
        assert float((grad[block].double() - pulled).norm()) <= 2.0**-7 * float(pulled.norm()), block
    del grad

    # The same weight under a full anchor, whose launches are other kernels.
    _, squares = ops.project_drift(ops.Operands([weight], [], [], [base]), "triton")
    total = sum(float((weight[block].double() - base[block].double()).square().sum()) for block in blocks_of(rows))
    assert float(squares[0]) == pytest.approx(total, rel=1e-5)
    grad = torch.zeros_like(weight)
    scales = torch.full((1,), 0.5, device=device)
    ops.pull_back_([grad], ops.Operands([weight], pretrained=[base]), [drift.new_empty(0, 0)], scales, True, "triton")
    for block in blocks_of(rows):
        moved = 0.5 * (weight[block].float() - base[block].float())
        assert torch.equal(grad[block], moved.to(torch.bfloat16)), block
