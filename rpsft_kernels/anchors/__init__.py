"""Anchors keep what the penalty needs of the pretrained weights: making, storing, loading and checking them."""

from .anchor import Anchor
from .collection import Anchors

__all__ = ["Anchor", "Anchors"]
