"""Buckets: weights that go through the operations together, about one transformer layer at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from ..costs import stretches_of


@dataclass(frozen=True)
class WeightSpec:
    """One weight as the planner sees it: ``rows`` x ``cols`` at ``rank`` (0 for a full anchor).

    Weights share a launch only where their ``key`` is equal (form, dtypes, device). ``parts`` is the number of bfloat16
    parts that hold one number of an intermediate (:func:`intermediate_parts`).
    """

    rows: int
    cols: int
    rank: int
    key: Hashable = None
    parts: int = 1

    @property
    def elements(self) -> int:
        return self.rows * self.cols

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the intermediate (shorter side, k) before it is padded to whole tiles, and of the sums (k, k) of a
        weight whose columns are cut into stretches: each has an intermediate and a sum of its own.
        """
        stretches = stretches_of(max(self.rows, self.cols))
        sums = 4 * stretches * self.rank**2 if stretches > 1 else 0
        return 2 * self.parts * stretches * min(self.rows, self.cols) * self.rank + sums

    @property
    def drift_bytes(self) -> int:
        return 4 * self.rank * self.rank


@dataclass(frozen=True)
class BucketLimits:
    """The most that one bucket may hold; a single weight beyond a limit still gets a bucket of its own.

    ``weights`` bounds the share of a model whose gradients the backward pass holds at once, ``elements`` their size
    (2 GiB in bfloat16). Below ``few_elements`` the number of weights does not count: small ones share a launch with as
    many others as it takes to keep a GPU busy. ``workspace_bytes`` bounds the intermediates (beside them split sums of
    C may take 4 MiB a weight), ``drift_bytes`` the k x k blocks. ``one_orientation`` keeps weights that are taller than
    wide out of the buckets of the others: a GPU contracts them from the other side, by another kernel variant.
    """

    weights: int = 16
    elements: int = 1 << 30
    workspace_bytes: int = 192 << 20
    drift_bytes: int = 192 << 20
    one_orientation: bool = True
    few_elements: int = 0


GPU_LIMITS = BucketLimits(few_elements=1 << 28)
# On the CPU many weights in one call save only the cost of the calls themselves, which matters for small weights at
# small ranks. The backward pass holds the gradients of a bucket.
CPU_LIMITS = BucketLimits(weights=8, drift_bytes=1 << 20, elements=16 << 20, one_orientation=False)
# Drifts that are summed over processes are better sent in few pieces.
CPU_LIMITS_OF_SHARDS = BucketLimits(weights=8, drift_bytes=16 << 20, one_orientation=False)


def limits_of(device_types: Iterable[str], summed: bool) -> BucketLimits:
    """Return the limits of one call's buckets.

    Devices decide them, not backends: all ranks must form the same buckets, and each may have a backend of its own.

    Args:
        device_types: the type of each weight's device.
        summed: True where drifts of some of the weights are summed over processes.
    """
    if all(device_type == "cpu" for device_type in device_types):
        return CPU_LIMITS_OF_SHARDS if summed else CPU_LIMITS
    return GPU_LIMITS


def intermediate_parts(subtracts_base: bool, bfloat16_subspaces: bool) -> int:
    """Return the number of bfloat16 parts that hold one number of an intermediate in the Triton kernels.

    These need the most workspace of all backends, and all ranks must form the same buckets, whichever they run. One
    part is enough where the intermediate is as small as the drift.
    """
    return 1 if subtracts_base and bfloat16_subspaces else 3


def plan_buckets(specs: Sequence[WeightSpec], limits: BucketLimits | None = None) -> list[list[int]]:
    """Divide the indices of ``specs`` into buckets; each has one key, in the given order.

    Without limits they are a GPU's. The plan depends on nothing but its arguments.
    """
    limits = limits or GPU_LIMITS
    classes: dict[Hashable, list[int]] = {}
    for i, spec in enumerate(specs):
        wide = limits.one_orientation and spec.rows <= spec.cols
        classes.setdefault((spec.key, spec.rank == 0, wide), []).append(i)
    buckets: list[list[int]] = []
    for members in classes.values():
        bucket: list[int] = []
        elements = workspace = drifts = 0
        for i in members:
            elements += specs[i].elements
            workspace += specs[i].workspace_bytes
            drifts += specs[i].drift_bytes
            over = elements > limits.elements or workspace > limits.workspace_bytes or drifts > limits.drift_bytes
            many = len(bucket) >= limits.weights and elements - specs[i].elements >= limits.few_elements
            if bucket and (over or many):
                buckets.append(bucket)
                bucket, elements, workspace = [], specs[i].elements, specs[i].workspace_bytes
                drifts = specs[i].drift_bytes
            bucket.append(i)
        buckets.append(bucket)
    # Sorted by their first weights, so that neighbours in the model are processed near each other.
    return sorted(buckets, key=lambda bucket: bucket[0])
