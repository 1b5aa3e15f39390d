"""Every pair of dtypes that a weight and its W0 can have, casts after the anchor was made included."""

from __future__ import annotations

import pytest
import torch

from rpsft_kernels import ops
from rpsft_kernels.ops import Operands
from rpsft_kernels.ops.triton.layout import TYPE_NAMES


@pytest.mark.parametrize("weight_dtype", TYPE_NAMES, ids=str)
@pytest.mark.parametrize("base_dtype", TYPE_NAMES, ids=str)
def test_the_drift_is_from_the_base_as_the_weight_would_hold_it(
    weight_dtype: torch.dtype, base_dtype: torch.dtype, device: torch.device
) -> None:
    base = torch.randn(48, 40, device=device).to(base_dtype)
    weight = (base.float() + 0.05 * torch.randn(48, 40, device=device)).to(weight_dtype)
    left, right = (torch.randn(size, 16, device=device).to(torch.bfloat16) for size in (48, 40))
    held = base.to(weight_dtype)
    difference = weight.double() - held.double()
    expected = left.double().T @ difference @ right.double()
    (drift,), squares = ops.project_drift(Operands([weight], [left], [right], [base]), "triton")
    # The difference and T are rounded once to bfloat16.
    assert (drift - expected).norm() <= 0.01 * expected.norm()
    torch.testing.assert_close(squares, drift.square().sum().view(1))
    empty, squares = ops.project_drift(Operands([weight], pretrained=[base]), "triton")
    torch.testing.assert_close(squares.double(), difference.square().sum().view(1), rtol=1e-5, atol=0)
    grad = torch.zeros(48, 40, device=device)
    scales = torch.full((1,), 2.0, device=device)
    ops.pull_back_([grad], Operands([weight], pretrained=[base]), empty, scales, False, "triton")
    torch.testing.assert_close(grad, 2 * (weight.float() - held.float()), rtol=1e-6, atol=0)
    # A model that was only cast has no drift at all.
    (drift,), squares = ops.project_drift(Operands([held], [left], [right], [base]), "triton")
    assert not drift.any() and not squares.any()
