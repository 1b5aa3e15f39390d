"""Fused kernels for the rotation penalty of RPSFT (arXiv 2605.10973)."""

from .anchors.anchor import Anchor
from .anchors.collection import Anchors
from .ops import use_backend
from .penalty import accumulate_rotation_grad_, project, rotation_penalty

__version__ = "0.1.0"

__all__ = [
    "Anchor",
    "Anchors",
    "accumulate_rotation_grad_",
    "project",
    "rotation_penalty",
    "use_backend",
]
