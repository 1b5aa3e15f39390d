"""Every pair of dtypes that a weight and its W0 can have, casts after the anchor was made included."""

from __future__ import annotations

import pytest
import torch

from rpsft_kernels.ops.triton.full_form import run_whole_backward, run_whole_forward
from rpsft_kernels.ops.triton.layout import TYPE_NAMES
from rpsft_kernels.ops.triton.project_drift import run_forward


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
    (drift,), squares = run_forward([weight], [left], [right], [base], [])
    # The difference and T are rounded once to bfloat16.
    assert (drift - expected).norm() <= 0.01 * expected.norm()
    torch.testing.assert_close(squares, drift.square().sum().view(1))
    _, squares = run_whole_forward([weight], [base])
    torch.testing.assert_close(squares.double(), difference.square().sum().view(1), rtol=1e-5, atol=0)
    grad = torch.zeros(48, 40, device=device)
    run_whole_backward([grad], [weight], [base], torch.full((1,), 2.0, device=device), False)
    torch.testing.assert_close(grad, 2 * (weight.float() - held.float()), rtol=1e-6, atol=0)
    # Where the model was only cast there is no drift at all.
    (drift,), squares = run_forward([held], [left], [right], [base], [])
    assert not drift.any() and not squares.any()
