"""Which value of a weight counts, where the model holds a 16-bit copy of its optimizer's master."""

from __future__ import annotations

import torch
from torch import Tensor


def replace_by_masters(copy: Tensor, masters: Tensor) -> Tensor:
    """Return the masters, and the copy where they do not round to it: float32, in the shape of both.

    Somebody has written into the copy alone there, and R must not pass that over. Values are thus never further than a
    rounding step from those of the model.
    """
    # Infinity minus infinity is not zero: where the model's parameter is not finite, R is not either.
    return torch.where(masters.to(copy.dtype).sub_(copy) == 0, masters, copy)
