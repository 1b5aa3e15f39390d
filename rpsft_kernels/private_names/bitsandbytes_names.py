"""Reads the quantised parameters of bitsandbytes, by the names of their classes: it is imported only to dequantise.

Checked with bitsandbytes 0.50.2.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

_FOUR_BITS, _EIGHT_BITS = "Params4bit", "Int8Params"


def is_quantised(parameter: Tensor) -> bool:
    """Whether the parameter holds 4 or 8 bits of each number of a weight."""
    return type(parameter).__name__ in (_FOUR_BITS, _EIGHT_BITS)


def shape_of_quantised(parameter: Any) -> tuple[int, ...]:
    """Return the shape of the weight that a quantised parameter stands for."""
    return tuple(parameter.quant_state.shape if type(parameter).__name__ == _FOUR_BITS else parameter.shape)


def dtype_of_quantised(parameter: Any) -> torch.dtype:
    """Return the dtype of the weight that :func:`dequantise` makes."""
    dtype: torch.dtype = parameter.quant_state.dtype if type(parameter).__name__ == _FOUR_BITS else torch.float32
    return dtype


def dequantise(parameter: Any, layer: nn.Module) -> Tensor:
    """Return the weight (m, n) of a layer that a quantised parameter stands for, as a new tensor."""
    functional = importlib.import_module("bitsandbytes.functional")
    if type(parameter).__name__ == _FOUR_BITS:
        weight: Tensor = functional.dequantize_4bit(parameter.data, parameter.quant_state)
        return weight
    state: Any = getattr(layer, "state", None)
    # The first forward pass moves the scales from the parameter to the layer's state.
    scales = parameter.SCB if getattr(parameter, "SCB", None) is not None else state.SCB
    weight = functional.int8_vectorwise_dequant(parameter.data, scales.to(parameter.device))
    return weight.to(torch.float32)
