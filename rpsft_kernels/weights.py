"""What a weight must be before any operation sees it."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_weight(weight: object, name: str) -> None:
    """Raise a ValueError under ``name`` unless ``weight`` is a dense 2-D floating tensor with data."""
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name}: got {type(weight).__name__}, expected a torch.Tensor of shape (m, n)")
    if weight.layout != torch.strided:
        raise ValueError(f"{name}: got layout {weight.layout}, expected a dense tensor; call {name}.to_dense()")
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got dtype {weight.dtype}, expected bfloat16, float16, float32 or float64; quantised and integer "
            "weights have no drift to penalise: leave them out (exclude=...)"
        )
    if weight.ndim != 2:
        raise ValueError(
            f"{name}: got {weight.ndim} dimension(s), shape {tuple(weight.shape)}, expected a matrix (m, n); "
            "leave it out, or pass a 2-D view"
        )
    if weight.device.type == "meta":
        raise ValueError(f"{name}: got a tensor on the meta device, expected one with data; materialise it first")
    if hasattr(weight, "placements"):
        raise ValueError(
            f"{name}: got a sharded DTensor, expected a whole tensor; sharded weights are not supported by this version"
        )
