"""The penalty over a training run: its strength at each step, its modes, and what it reports."""

from .attach import attach
from .penalty import RotationPenalty

__all__ = ["RotationPenalty", "attach"]
