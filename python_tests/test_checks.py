from __future__ import annotations

from typing import Any

import pytest
import torch

from bad_weights import BAD_WEIGHTS
from rpsft_kernels.checks import check_weight
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
