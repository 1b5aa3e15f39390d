"""The rotation penalty of weights that adapters of low rank move: W + s B A, without a tensor of the weight's size.

With P = B^T U (r, k) and Q = A V (r, k), the drift of a weight is C = s P^T Q, and ``R = ||C||^2 = s^2 <P P^T, Q Q^T>``
takes two r x r products. Its gradients are ``dR/dB = 2 s^2 U (P^T (Q Q^T))`` and ``dR/dA = 2 s^2 ((P P^T) Q) V^T``.
"""

from .base import QuantisedWeight
from .batches import Batch, Batches, LayerImages, LayerSpec
from .grouped import GroupedProducts
from .layers import AdaptedLayer, AdaptedLayers, Adapter, Factor, facts_of, find_adapted, whole_replica
from .products import add_products_, project_factors

__all__ = [
    "AdaptedLayer",
    "AdaptedLayers",
    "Adapter",
    "Batch",
    "Batches",
    "Factor",
    "GroupedProducts",
    "LayerImages",
    "LayerSpec",
    "QuantisedWeight",
    "add_products_",
    "facts_of",
    "find_adapted",
    "project_factors",
    "whole_replica",
]
