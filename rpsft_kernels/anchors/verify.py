"""Checks that a model holds the weights that were anchored; each rank reads its own shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..checks import dtype_name
from ..distributed import LocalWeight, ReplicatedWeight
from .anchor import Anchor
from .fingerprint import Fingerprint, content_sum

_WRAP = 1 << 64


def find_differences(
    anchors: Mapping[str, Anchor], fingerprints: Mapping[str, Fingerprint], weights: Mapping[str, LocalWeight]
) -> list[str]:
    """Describe, in a line each, the weights that differ from the anchored ones.

    Collective where weights lie on several ranks; every rank then has the same answer.
    """
    problems: dict[str, str] = {}
    pending: dict[str, list[str]] = {}
    for name in anchors:
        weight, fingerprint = weights.get(name), fingerprints.get(name)
        if weight is None:
            problems[name] = "the model has no parameter of this name"
        elif fingerprint is None:
            problems[name] = "no fingerprint was taken (anchors built by hand), nothing to verify by"
        elif weight.device.type == "meta":
            problems[name] = "the parameter is on the meta device, without values"
        elif tuple(weight.shape) != fingerprint.shape:
            problems[name] = f"got shape {tuple(weight.shape)}, anchored with {fingerprint.shape}"
        elif dtype_name(weight.dtype) != fingerprint.dtype:
            problems[name] = f"got dtype {dtype_name(weight.dtype)}, anchored in {fingerprint.dtype}"
        else:
            pending.setdefault(weight.group_name, []).append(name)
    for names in pending.values():
        for name, total in zip(names, _whole_sums([weights[name] for name in names]), strict=True):
            if f"{total:016x}" != fingerprints[name].checksum:
                problems[name] = (
                    f"got other values (checksum {total:016x}), anchored with {fingerprints[name].checksum}"
                )
    return [f"{name}: {problems[name]}" for name in anchors if name in problems]


def _whole_sums(weights: list[LocalWeight]) -> list[int]:
    """Return the checksums of whole weights that lie in one group."""
    own = [shard_sum(weight) for weight in weights]
    group = weights[0].group
    # A replica lies whole on every rank: each reads all of it where the work on it is not divided. Its shard does not
    # tell: of one that is divided, a single rank may have all and the others nothing.
    alone = [isinstance(weight, ReplicatedWeight) and not weight.divided for weight in weights]
    if group is None or all(alone):
        return own
    signed = [value - _WRAP if value >= _WRAP // 2 else value for value in own]
    table = torch.tensor(signed, dtype=torch.int64, device=weights[0].device)
    # Integers wrap around, as the checksum does.
    dist.all_reduce(table, group=group)
    return [value if whole else total % _WRAP for value, total, whole in zip(own, table.tolist(), alone, strict=True)]


def shard_sum(weight: LocalWeight) -> int:
    """Return the shard's summand of its weight's checksum."""
    if not weight.shard.numel:
        return 0
    columns = weight.shape[1]
    views = weight.shard.views(weight.values().detach())
    return sum(content_sum(view, rect.rows[0] * columns + rect.cols[0], columns) for rect, view in views) % _WRAP
