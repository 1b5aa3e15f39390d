"""What the ranks of a group tell each other: that they mean the same call, and sums of what each computed.

Sums are all-reduces of the process group. Their order is the backend's: fixed for a given backend, group and buffer
size, and every rank receives the same bits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# Calls of this process by group: every rank of a group makes the same ones in the same order.
_calls: Counter[str] = Counter()
_FAILED = 1


@dataclass
class PendingSum:
    """A sum on its way; ``tensor`` holds it once :meth:`Exchange.finish` has returned."""

    tensor: Tensor
    work: Any


class Exchange:
    """One call's traffic within one process group.

    Raises (every method):
        RuntimeError: the group failed; the message names the ranks that did not get as far as this call.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        self.size, self.rank = group.size(), group.rank()
        _calls[group.group_name] += 1
        self._call = _calls[group.group_name]
        self._report()

    def agree(self, digest: int, covered: int, sample: int = 0, failed: bool = False) -> list[int]:
        """Refuse together to go on where ranks disagree; costs one all-reduce of 3 integers per rank.

        Args:
            digest: of everything that must be the same on all ranks, in [0, 2^62).
            covered: elements that this rank works on less its share of those that there are: sums to 0.
            sample: anything in [0, 2^62), returned from every rank.
            failed: this rank refuses for a reason of its own, which the caller will raise.

        Raises:
            ValueError: another rank failed, digests differ (the message names the ranks), or elements are covered
                twice or not at all.
        """
        table = torch.zeros(self.size + 1, 3, dtype=torch.int64)
        table[self.rank] = torch.tensor([digest, sample, _FAILED if failed else 0])
        table[self.size, 0] = covered
        pending = self.start(table.to(self.device))
        self.finish(pending)
        rows = pending.tensor.tolist()
        if failed:
            return []
        refusing = [i for i in range(self.size) if rows[i][2]]
        if refusing:
            raise ValueError(
                f"{self._named(refusing)} refused this call for a reason that it raises itself; no rank has gone on"
            )
        digests = [row[0] for row in rows[: self.size]]
        if len(set(digests)) > 1:
            common = max(set(digests), key=digests.count)
            odd = [i for i, other in enumerate(digests) if other != common]
            raise ValueError(
                f"anchors: got others on {self._named(odd)} than on the rest of {self.size} ranks (names, shapes, "
                "ranks, forms, dtypes, contents or coeff differ), expected the same call with the same anchors on "
                "every rank: make them together (Anchors.from_model on all ranks), or load one file on all of them"
            )
        if rows[self.size][0]:
            raise ValueError(
                "anchors: got parts that do not make up the whole weights "
                f"({rows[self.size][0]:+d} elements), expected each element on exactly one rank: make or load the "
                "anchors with this model as it is sharded now"
            )
        return [row[1] for row in rows[: self.size]]

    def start(self, tensor: Tensor) -> PendingSum:
        """Begin to sum ``tensor`` over the ranks, in place."""
        try:
            return PendingSum(tensor, dist.all_reduce(tensor, group=self.group, async_op=True))
        except RuntimeError as error:
            raise self._lost(error) from error

    def finish(self, pending: PendingSum) -> Tensor:
        """Wait for the sum (on a GPU: make the current stream wait)."""
        try:
            pending.work.wait()
        except RuntimeError as error:
            raise self._lost(error) from error
        return pending.tensor

    def check_health(self, health: Sequence[float]) -> None:
        """Raise unless every rank's number is finite.

        Raises:
            ValueError: names the ranks whose weights are not.
        """
        sick = [i for i, value in enumerate(health) if not abs(value) < float("inf")]
        if sick:
            raise ValueError(
                f"weights: got NaN or infinity in the drifts of {self._named(sick)}, expected finite weights on every "
                "rank; no gradient was changed"
            )

    def _named(self, members: Sequence[int]) -> str:
        ranks = [str(dist.get_global_rank(self.group, member)) for member in members]
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)

    def _key(self, member: int) -> str:
        return f"rpsft_kernels/{self.group.group_name}/{member}"

    def _report(self) -> None:
        """Leave word in the job's store that this rank has come as far as this call."""
        store = _store()
        if store is not None:
            store.set(self._key(self.rank), str(self._call))

    def _lost(self, error: RuntimeError) -> RuntimeError:
        """What to raise when the group failed, by what the ranks have left in the store."""
        behind, store = [], _store()
        try:
            for member in range(self.size) if store is not None else ():
                key = self._key(member)
                if not store.check([key]) or int(store.get(key)) < self._call:
                    behind.append(member)
            who = (
                f"{self._named(behind)} never came to this call"
                if behind
                else "every rank had come to this call: one stopped in the middle of it"
            )
        except RuntimeError:
            who = "the job's store, which rank 0 or the launcher keeps, is gone too"
        return RuntimeError(
            f"rotation penalty: the sum over {self.size} ranks failed on rank {dist.get_rank()}: {who}; no gradient "
            f"was changed. The process group said: {error}"
        )


def _store() -> Any:
    try:
        return dist.distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):
        return None
