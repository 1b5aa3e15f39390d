from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bad_weights import BAD_WEIGHTS
from rpsft_kernels.checks import check_weight, read_rank
from support import DTYPES, LAYOUTS, Layout, random_matrix


def _sharded() -> torch.Tensor:
    tensor = torch.ones(4, 4)
    tensor.placements = ("Shard(0)",)  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(("weight", "message"), [*BAD_WEIGHTS, (_sharded(), "got a DTensor, expected a plain tensor")])
def test_refused_by_name(weight: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r"^layers\.0\.weight: " + message):
        check_weight(weight, "layers.0.weight")


def test_sparse_rows_are_not_dense() -> None:
    with pytest.warns(UserWarning, match="Sparse CSR"):
        weight = torch.ones(4, 4).to_sparse_csr()
    with pytest.raises(ValueError, match=r"^w: got layout torch\.sparse_csr, expected a dense tensor"):
        check_weight(weight, "w")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_admitted(dtype: torch.dtype, layout: Layout) -> None:
    for shape in ((5, 3), (1, 1), (0, 4)):
        weight = random_matrix(*shape, dtype, layout=layout)
        for admitted in (weight, torch.nn.Parameter(weight), weight.requires_grad_() * 2):
            check_weight(admitted, "w")


def test_ranks_and_shares_of_energy() -> None:
    assert read_rank(768) == 768 and type(read_rank(1)) is int
    assert read_rank(np.float64(0.9)) == 0.9 and type(read_rank(np.float64(0.9))) is float


@pytest.mark.parametrize("rank", [0, -3, True, "0.9", None, torch.tensor(0.9)])
def test_no_rank(rank: object) -> None:
    with pytest.raises(ValueError, match=r"^rank: got .*, expected an int of at least 1 \(the paper takes 768\)"):
        read_rank(rank)


@pytest.mark.parametrize("rank", [0.0, 1.0, 2.0, -0.1, float("nan"), float("inf")])
def test_no_share_of_energy(rank: float) -> None:
    with pytest.raises(
        ValueError, match=r"^rank: got .* or a float strictly between 0 and 1, a share of each weight's"
    ):
        read_rank(rank)
