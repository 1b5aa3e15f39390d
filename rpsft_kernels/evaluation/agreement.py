"""One number for everything about a call that all ranks of a process group must share."""

from __future__ import annotations

import hashlib
import struct
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..anchors.anchor import Anchor
from ..anchors.fingerprint import Fingerprint, content_sum
from ..checks import dtype_name
from ..distributed import ReplicatedWeight
from .bucket import Bucket
from .pairing import AnchoredWeight

MASK = (1 << 62) - 1
# Checksums of U, V and W0 of whole anchors, each computed once.
_contents: weakref.WeakKeyDictionary[Anchor, int] = weakref.WeakKeyDictionary()


def members_of(weights: Sequence[AnchoredWeight], group_name: str) -> list[AnchoredWeight]:
    """Return the weights whose shards lie in a process group."""
    return [
        anchored
        for anchored in weights
        if anchored.weight.group is not None and anchored.weight.group_name == group_name
    ]


def describe_call(
    weights: Sequence[AnchoredWeight],
    buckets: Iterable[Bucket],
    group_name: str,
    fingerprints: Mapping[str, Fingerprint] | None = None,
) -> bytes:
    """Return a digest of a group's weights, anchors and buckets, which stay the same from call to call.

    Args:
        weights: the weights of the call.
        buckets: of these weights.
        group_name: the group's name.
        fingerprints: those of the pretrained weights, where they are known. They tell parts of different W0 apart,
            which have no element in common that could be compared.
    """
    words = []
    for anchored in members_of(weights, group_name):
        name, weight, anchor = anchored.name, anchored.weight, anchored.anchor
        dtypes = [f"{piece}:{dtype_name(tensor.dtype)}" for piece, tensor in anchor.pieces().items()]
        content = content_of(anchor) if anchor.part is None else None
        fingerprint = (fingerprints or {}).get(name)
        pretrained = None if fingerprint is None else fingerprint.checksum
        facts = anchor.shape, anchor.rank, weight.dtype, dtypes, anchor.energy, anchor.random_seed, content, pretrained
        words.append(f"{name} {facts!r}")
    # Each sum over ranks takes the drifts of one bucket, which must hold the same weights on every rank.
    words += [str([weights[i].name for i in b.members]) for b in buckets if b.summed and b.group_name == group_name]
    return hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest()


def content_of(anchor: Anchor) -> int:
    content = _contents.get(anchor)
    if content is None:
        # Not B, whose bits another machine's arithmetic may differ in.
        pieces = [piece for piece in (anchor.left, anchor.right, anchor.base) if piece is not None]
        content = _contents[anchor] = sum(content_sum(piece) for piece in pieces) & MASK
    return content


def digest(description: bytes, members: Sequence[AnchoredWeight], coeff: float | None) -> int:
    """Return the number that ranks compare: a digest of the description, of coeff, and of the gradients' dtypes.

    Args:
        description: what :func:`describe_call` returned.
        members: the group's weights.
        coeff: None if the call adds to no gradients.

    Returns:
        A number in [0, 2^62).
    """
    hasher = hashlib.blake2b(description, digest_size=8)
    if coeff is not None:
        hasher.update(struct.pack("<d", coeff))
        weights = [anchored.weight for anchored in members]
        gradients = [weight.gradient_dtype if weight.requires_grad else None for weight in weights]
        hasher.update(repr(gradients).encode())
    return int.from_bytes(hasher.digest(), "little") & MASK


def gradient_checksum(members: Iterable[AnchoredWeight]) -> int:
    """Return the checksum of the smallest gradient of a replicated weight; 0 if there is no such gradient.

    It is the same on all ranks if gradients have been averaged already. A gradient of zeros does not tell: the weight
    behind a gate that is zero at first has one on every rank, averaged or not. In its place the smallest gradient that
    is not zero is taken, of all parameters of the wrapped model where those of the anchored weights are zero. This
    reads all gradients once; 0 is returned if all of them are zero, as ``zero_grad(set_to_none=False)`` leaves them.
    What is left of earlier steps at parameters that are frozen now is passed over.
    """
    weights = [anchored.weight for anchored in members if isinstance(anchored.weight, ReplicatedWeight)]
    gradients = [weight.parameter.grad for weight in weights if weight.parameter.grad is not None]
    if not gradients:
        return 0
    checksum = content_sum(min(gradients, key=Tensor.numel)) & MASK
    if checksum:
        return checksum
    others = {id(tensor): tensor for weight in weights for tensor in weight.replicas() if tensor.requires_grad}.values()
    for candidates in (gradients, [tensor.grad for tensor in others if tensor.grad is not None]):
        smallest = _smallest_nonzero(candidates)
        if smallest is not None:
            return content_sum(smallest) & MASK
    return 0


def _smallest_nonzero(gradients: Iterable[Tensor]) -> Tensor | None:
    dense = sorted((gradient for gradient in gradients if _is_dense(gradient)), key=Tensor.numel)
    if not dense:
        return None
    device = dense[0].device
    # Norms are queued one after the other, and waited for once.
    largest = torch.stack([torch.linalg.vector_norm(gradient.detach(), torch.inf).to(device) for gradient in dense])
    return next((gradient for gradient, size in zip(dense, largest.tolist(), strict=True) if size != 0), None)


def _is_dense(gradient: Tensor) -> bool:
    return gradient.layout == torch.strided and gradient.dtype.is_floating_point and gradient.numel() > 0
