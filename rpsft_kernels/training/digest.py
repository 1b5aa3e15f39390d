"""A digest of anchors, by which a resumed run knows those that it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from ..anchors.anchor import Anchor
from ..anchors.collection import Anchors
from ..anchors.fingerprint import content_checksum
from ..checks import dtype_name


def digest_anchors(anchors: Anchors) -> str:
    """Return a digest of the anchors' names, shapes, ranks, forms, seeds and pretrained weights, in hexadecimal digits.

    It is the same for anchors that were made anew of the same model, on any number of ranks: of U and V, whose last
    bits depend on a solver, it knows nothing.
    """
    hasher = hashlib.blake2b(digest_size=16)
    for name in sorted(anchors):
        anchor, fingerprint = anchors[name], anchors.fingerprints.get(name)
        content = _content_of(anchor) if fingerprint is None else fingerprint.checksum
        facts = (name, anchor.shape, anchor.rank, anchor.form, dtype_name(anchor.weight_dtype), content)
        hasher.update(repr(facts).encode())
        # Random subspaces of two seeds hold nearly the same energy, which tells other subspaces apart.
        if anchor.random_seed is not None:
            hasher.update(f"random {anchor.random_seed}".encode())
    return hasher.hexdigest()


def _content_of(anchor: Anchor) -> str:
    """Return a checksum of what is kept of a weight that nobody took the fingerprint of; "" of a part."""
    piece = anchor.block if anchor.form == "block" else anchor.base
    return "" if piece is None or anchor.part is not None else content_checksum(piece)


def describe_other(state: Mapping[str, Any], digest: str, energy: float) -> str | None:
    """Say why anchors are not those that a state was saved with; None if they are.

    Args:
        state: a state of the penalty, with ``anchors`` and ``energy``.
        digest: of the anchors at hand.
        energy: their sum sigma^2, which tells apart subspaces of the same weights (random ones, say).
    """
    if state["anchors"] != digest:
        return f"digest {digest}, saved with {state['anchors']}"
    if abs(energy - state["energy"]) > 1e-3 * abs(state["energy"]):
        return f"sum sigma^2 = {energy:.6g}, saved with {state['energy']:.6g}"
    return None
