"""Checks that a model holds the weights that were anchored; each rank reads its own shard."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist

from ..checks import dtype_name
from ..distributed import LocalWeight, ReplicatedWeight, gather_objects
from .anchor import Anchor
from .fingerprint import Fingerprint, content_sum

_WRAP = 1 << 64


class Comparison:
    """The weights of a model beside those that were anchored, as far as this rank can tell by itself.

    Args:
        anchors: by name.
        fingerprints: of the weights that were anchored.
        weights: those of the model, as they lie here.
    """

    def __init__(
        self,
        anchors: Mapping[str, Anchor],
        fingerprints: Mapping[str, Fingerprint],
        weights: Mapping[str, LocalWeight],
    ) -> None:
        self._fingerprints = fingerprints
        self._problems: dict[str, str] = {}
        # This rank's summands of the checksums of weights over several ranks, by group and name.
        self._summands: dict[str, dict[str, int]] = {}
        for name in anchors:
            weight, fingerprint = weights.get(name), fingerprints.get(name)
            problem = _find_problem(weight, fingerprint)
            if problem is None:
                assert weight is not None
                own = shard_sum(weight)
                # A replica lies whole on every rank: each reads all of it where the work on it is not divided. Its
                # shard does not tell: of one that is divided, a single rank may have all and the others nothing.
                alone = isinstance(weight, ReplicatedWeight) and not weight.divided
                if weight.group is None or alone:
                    problem = self._compare(name, own)
                else:
                    self._summands.setdefault(weight.group_name, {})[name] = own
            if problem is not None:
                self._problems[name] = problem
        self._names = list(anchors)

    def _compare(self, name: str, total: int) -> str | None:
        anchored = self._fingerprints[name].checksum
        if f"{total:016x}" == anchored:
            return None
        return f"got other values (checksum {total:016x}), anchored with {anchored}"

    def find_differences(self, groups: Mapping[str, dist.ProcessGroup]) -> list[str]:
        """Describe, in a line each, the weights that differ, also where only another rank sees it.

        Args:
            groups: those that hold the weights. All of their ranks make this call.
        """
        problems = dict(self._problems)
        for group_name, group in groups.items():
            tables = gather_objects((self._problems, self._summands.get(group_name, {})), group)
            for member, (told, _) in enumerate(tables):
                for name, problem in told.items():
                    problems.setdefault(name, f"{problem} (on rank {dist.get_global_rank(group, member)})")
            names = dict.fromkeys(name for _, summands in tables for name in summands)
            for name in names:
                absent = [dist.get_global_rank(group, i) for i, table in enumerate(tables) if name not in table[1]]
                problem = (
                    f"got no anchor of it on ranks {absent}, expected the same anchors on all"
                    if absent
                    else self._compare(name, sum(summands[name] for _, summands in tables) % _WRAP)
                )
                if problem is not None:
                    problems.setdefault(name, problem)
        return [f"{name}: {problems[name]}" for name in dict.fromkeys([*self._names, *problems]) if name in problems]


def _find_problem(weight: LocalWeight | None, fingerprint: Fingerprint | None) -> str | None:
    """Say why a weight cannot be the one that was anchored, before its values are read; None if it may be."""
    if weight is None:
        return "the model has no parameter of this name"
    if fingerprint is None:
        return "no fingerprint was taken (anchors built by hand), nothing to verify by"
    if weight.device.type == "meta":
        return "the parameter is on the meta device, without values"
    if tuple(weight.shape) != fingerprint.shape:
        return f"got shape {tuple(weight.shape)}, anchored with {fingerprint.shape}"
    if dtype_name(weight.dtype) != fingerprint.dtype:
        return f"got dtype {dtype_name(weight.dtype)}, anchored in {fingerprint.dtype}"
    return None


def shard_sum(weight: LocalWeight) -> int:
    """Return the shard's summand of its weight's checksum."""
    if not weight.shard.numel:
        return 0
    columns = weight.shape[1]
    views = weight.shard.views(weight.values().detach())
    return sum(content_sum(view, rect.rows[0] * columns + rect.cols[0], columns) for rect, view in views) % _WRAP
