"""Objects that are not weights, with the message that refuses each."""

from __future__ import annotations

from typing import Any

import torch

# Objects that are not weights, with the message that refuses each.
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
