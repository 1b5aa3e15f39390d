from __future__ import annotations

from typing import Any

import pytest
import torch
from support import DTYPES, LAYOUTS, Layout, random_matrix

from rpsft_kernels.weights import check_weight


def _sharded() -> torch.Tensor:
    tensor = torch.ones(4, 4)
    tensor.placements = ("Shard(0)",)  # type: ignore[attr-defined]
    return tensor


# What is no weight, with what must be said of it.
BAD_WEIGHTS: list[tuple[Any, str]] = [
    (None, r"got NoneType, expected a torch\.Tensor of shape \(m, n\)"),
    ([[1.0]], r"got list, expected a torch\.Tensor"),
    (torch.ones(4, 4).to_sparse(), r"got layout torch\.sparse_coo, expected a dense tensor; call .*\.to_dense\(\)"),
    (torch.ones(4, 4, dtype=torch.int8), r"got dtype torch\.int8, expected bfloat16.*leave them out \(exclude="),
    (torch.ones(4, 4, dtype=torch.bool), r"got dtype torch\.bool, expected bfloat16"),
    (torch.ones(4, 4, dtype=torch.complex64), r"got dtype torch\.complex64, expected bfloat16"),
    (torch.ones(4, 4).to(torch.float8_e5m2), r"got dtype torch\.float8_e5m2, expected bfloat16"),
    (torch.ones(()), r"got 0 dimension\(s\), shape \(\), expected a matrix \(m, n\)"),
    (
        torch.ones(4),
        r"got 1 dimension\(s\), shape \(4,\), expected a matrix \(m, n\); leave it out, or pass a 2-D view",
    ),
    (torch.ones(4, 2, 2), r"got 3 dimension\(s\), shape \(4, 2, 2\), expected a matrix"),
    (torch.ones(4, 4, device="meta"), "got a tensor on the meta device, expected one with data; materialise it first"),
]


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
