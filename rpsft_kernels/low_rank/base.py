"""The weights below adapters: frozen, and perhaps quantised."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import LocalWeight
from ..private_names.bitsandbytes_names import dequantise, dtype_of_quantised


@dataclass(frozen=True)
class QuantisedWeight(LocalWeight):
    """A weight of which a layer of bitsandbytes holds 4 or 8 bits a number. Every reading of its values dequantises it.

    Attributes:
        layer: the layer that holds the parameter.
    """

    layer: nn.Module | None = None

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of_quantised(self.parameter)

    def values(self) -> Tensor:
        assert self.layer is not None
        return dequantise(self.parameter, self.layer)
