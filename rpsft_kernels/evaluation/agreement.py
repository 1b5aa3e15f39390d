"""Everything about a call that all ranks of a process group must share, in one number."""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections.abc import Iterable, Sequence

from torch import Tensor

from ..anchors.anchor import Anchor
from ..anchors.fingerprint import content_sum
from ..checks import dtype_name
from ..distributed import ReplicatedWeight
from .bucket import Bucket
from .pairing import AnchoredWeight

_MASK = (1 << 62) - 1
# Contents of the subspaces of whole anchors, once per anchor.
_contents: weakref.WeakKeyDictionary[Anchor, int] = weakref.WeakKeyDictionary()


def members_of(weights: Sequence[AnchoredWeight], group_name: str) -> list[AnchoredWeight]:
    """The weights whose shards lie in a process group."""
    return [one for one in weights if one.weight.group is not None and one.weight.group_name == group_name]


def describe_call(weights: Sequence[AnchoredWeight], buckets: Iterable[Bucket], group_name: str) -> bytes:
    """The digest of a group's weights, anchors and buckets: of what stays the same from call to call."""
    words = []
    for one in members_of(weights, group_name):
        name, weight, anchor = one.name, one.weight, one.anchor
        dtypes = [f"{piece}:{dtype_name(tensor.dtype)}" for piece, tensor in anchor.pieces().items()]
        content = _content(anchor) if anchor.part is None else None
        words.append(f"{name} {anchor.shape} {anchor.rank} {weight.dtype} {dtypes} {anchor.energy!r} {content}")
    # The drifts that are summed in one go must be the same on every rank.
    words += [str([weights[i].name for i in b.members]) for b in buckets if b.summed and b.group_name == group_name]
    return hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest()


def _content(anchor: Anchor) -> int:
    found = _contents.get(anchor)
    if found is None:
        subspaces = [basis for basis in (anchor.left, anchor.right) if basis is not None]
        found = _contents[anchor] = sum(content_sum(basis) for basis in subspaces) & _MASK
    return found


def digest(description: bytes, members: Sequence[AnchoredWeight], coeff: float | None) -> int:
    """What ranks compare: the description, and which gradients are added to with which factor.

    Args:
        coeff: None where no gradients are added to.

    Returns:
        A number in [0, 2^62).
    """
    found = hashlib.blake2b(description, digest_size=8)
    if coeff is not None:
        found.update(struct.pack("<d", coeff))
        gradients = [one.weight.gradient_dtype if one.weight.requires_grad else None for one in members]
        found.update(repr(gradients).encode())
    return int.from_bytes(found.digest(), "little") & _MASK


def gradient_checksum(members: Iterable[AnchoredWeight]) -> int:
    """The checksum of the smallest gradient of a replicated weight that there is, 0 without one: the same on all ranks
    where gradients have been averaged.
    """
    found = [
        one.weight.parameter.grad
        for one in members
        if isinstance(one.weight, ReplicatedWeight) and one.weight.parameter.grad is not None
    ]
    return content_sum(min(found, key=Tensor.numel)) & _MASK if found else 0
