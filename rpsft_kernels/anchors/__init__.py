"""What is kept of the pretrained weights: made, stored, read and checked."""

from .anchor import Anchor
from .collection import Anchors

__all__ = ["Anchor", "Anchors"]
