from __future__ import annotations

import pytest
import torch

import rpsft_kernels.anchors.tensors as pieces
from rpsft_kernels.anchors.tensors import copy_base, exact_base_dtype, pad_rows


@pytest.mark.parametrize("rank", [1, 5, 15, 16, 17, 32, 40])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_padded_rows_are_aligned_and_zero_behind_the_rank(rank: int, dtype: torch.dtype) -> None:
    basis = torch.randn(7, rank, generator=torch.Generator().manual_seed(0)).to(dtype)
    view = pad_rows(basis)
    assert torch.equal(view, basis)
    stride = view.stride(0)
    assert view.stride(1) == 1 and stride % 16 == 0 and stride - rank < 16
    assert all(view[row].data_ptr() % 16 == 0 for row in range(7))
    whole = view.as_strided((7, stride), (stride, 1))
    assert not whole[:, rank:].any()


def test_padding_again_clears_foreign_padding() -> None:
    view = pad_rows(torch.ones(4, 20, dtype=torch.bfloat16).repeat(1, 2)[:, :20])
    foreign = torch.ones(4, 32, dtype=torch.bfloat16)[:, :20]
    for basis in (view, foreign):
        assert not pad_rows(basis).as_strided((4, 32), (32, 1))[:, 20:].any()


def test_padding_copies_only_what_is_laid_out_otherwise() -> None:
    aligned = torch.ones(4, 32, dtype=torch.bfloat16)
    assert pad_rows(aligned).data_ptr() == aligned.data_ptr()
    for other in (torch.ones(32, 4).T, torch.ones(4, 48)[:, :32], torch.ones(129)[1:].view(4, 32)):
        copy = pad_rows(other)
        assert copy.data_ptr() != other.data_ptr() and copy.stride() == (32, 1) and torch.equal(copy, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("trial", [1, 1 << 22])
def test_base_in_bfloat16_only_where_exact(dtype: torch.dtype, trial: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_TRIAL_ELEMENTS", trial)
    exact = torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).bfloat16().half().to(dtype)
    exact = exact.bfloat16().to(dtype)
    exact[2, 3] = -0.0
    small = copy_base(exact, exact_base_dtype(exact))
    assert small.dtype == torch.bfloat16
    assert torch.equal(small.to(dtype), exact) and small[2, 3].signbit()
    exact[8, 5] += exact[8, 5] * 2**-9
    kept = copy_base(exact, exact_base_dtype(exact))
    assert kept.dtype == dtype and torch.equal(kept, exact)


@pytest.mark.parametrize(("value", "dtype"), [(3.4e38, torch.float32), (1e-300, torch.float64), (1e300, torch.float64)])
def test_base_beyond_bfloat16s_range_keeps_its_dtype(value: float, dtype: torch.dtype) -> None:
    weight = torch.full((3, 3), value, dtype=dtype)
    assert exact_base_dtype(weight) == dtype and torch.equal(copy_base(weight, dtype), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_base_is_a_contiguous_copy(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    for source in (weight, weight.T, weight[::2, 1:4]):
        copy = copy_base(source, dtype)
        assert copy.is_contiguous() and copy.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        assert torch.equal(copy, source)
