"""The penalty over a training run: its strength at each step, its modes, and what it reports."""

from .penalty import RotationPenalty

__all__ = ["RotationPenalty"]
