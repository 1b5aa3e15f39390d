"""Reads what an accelerator has prepared; accelerate is not imported for it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .table import read


def prepared_models(accelerator: object) -> list[nn.Module]:
    """Return the models as they were before they were wrapped and compiled."""
    models: list[nn.Module] = read(accelerator, "Accelerator", "prepared models")
    return models


def prepared_optimizers(accelerator: object) -> list[Any]:
    """Return accelerate's wrappers of the optimizers."""
    optimizers: list[Any] = read(accelerator, "Accelerator", "prepared optimizers")
    return optimizers
