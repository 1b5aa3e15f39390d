"""What a weight must be before any operation sees it."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_weight(weight: object, name: str, dimensions: int = 2, sharded: bool = False) -> None:
    """Raise a ValueError under ``name`` unless ``weight`` is a dense floating tensor with data, a matrix by default.

    ``sharded`` admits a DTensor.
    """
    if not isinstance(weight, Tensor):
        raise ValueError(f"{name}: got {type(weight).__name__}, expected a torch.Tensor of shape (m, n)")
    if weight.layout != torch.strided:
        raise ValueError(f"{name}: got layout {weight.layout}, expected a dense tensor; call {name}.to_dense()")
    if weight.dtype not in DTYPES:
        raise ValueError(
            f"{name}: got dtype {weight.dtype}, expected bfloat16, float16, float32 or float64; quantised and integer "
            "weights have no drift to penalise: leave them out (exclude=...)"
        )
    if weight.ndim != dimensions:
        raise ValueError(
            f"{name}: got {weight.ndim} dimension(s), shape {tuple(weight.shape)}, expected "
            + ("a matrix (m, n); " if dimensions == 2 else "the elements of a flat range; ")
            + "leave it out, or pass a 2-D view"
        )
    if weight.device.type == "meta":
        raise ValueError(f"{name}: got a tensor on the meta device, expected one with data; materialise it first")
    if not sharded and hasattr(weight, "placements"):
        raise ValueError(
            f"{name}: got a DTensor, expected a plain tensor; of a sharded weight pass the part at hand: "
            f"{name}.to_local()"
        )
