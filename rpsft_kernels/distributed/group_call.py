"""Agreement and sums within one process group: its ranks check that they make the same call, then sum results.

Sums are all-reduces of the process group. Their order is the backend's: fixed for a given backend, group and buffer
size, and every rank receives the same bits.

A step on a GPU with weights in such groups waits for the GPU on purpose: the ranks' agreement decides whether they go
on. For each group the step waits in :meth:`GroupCall.check_consistent`, before anything is launched (for the work that
the GPU had queued; a rank in several groups checks twice in each), and once for :meth:`GroupCall.check_health`, before
any gradient is touched (for the projections and the sums). Gradients of replicated weights (DDP) that exist cost one
more wait, for a checksum of the smallest. Such a step cannot be captured in a CUDA graph. Groups of one rank, and
weights in none, wait for nothing.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..private_names import default_store
from .coverage import MODULUS, measure
from .shard import Shard
from .wire import find_wire

# Number of calls of this process, by group. Every rank of a group makes the same calls in the same order; a rank that
# missed some adopts the others' count at its next consistency check.
_calls: Counter[str] = Counter()
# Seconds that ranks wait for each other's report after their group failed. A shorter wait would take a rank that is
# only late, or that hears of the failure later, for the one that is gone.
_REPORT_SECONDS = 3.0
_POLL_SECONDS = 0.02
# A rank's number in :meth:`GroupCall.check_health` where it has failed; sums of squares are never negative.
FAILED = float("-inf")


@dataclass
class PendingSum:
    """A sum that has been started; ``tensor`` holds it after :meth:`GroupCall.finish`.

    Attributes:
        tensor: the summands at first, and in the end the sum.
        sent: ``tensor``, or its copy on a device that the group serves.
        work: what to wait for.
    """

    tensor: Tensor
    sent: Tensor
    work: Any


class GroupCall:
    """One call's traffic within one process group.

    Args:
        group: the processes.
        device: that of the weights. Where the group has no backend for it, sums travel through another device.

    Raises (every method):
        ValueError: the group serves no device that is there (when the call begins).
        RuntimeError: the group failed; the message names the ranks that did not reach this call, or that reached it
            and fell silent.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group, self.device = group, device
        wire = find_wire(group, device)
        self._wire = None if wire == device else wire
        self.size, self.rank = group.size(), group.rank()
        _calls[group.group_name] += 1
        self._call = _calls[group.group_name]
        self._report()

    def check_consistent(
        self, digest: int, shards: Mapping[str, Shard], gradient_checksum: int = 0, failed: bool = False
    ) -> list[int]:
        """Raise on every rank where ranks disagree; costs one all-reduce of 3 integers per rank, and 3 more.

        Args:
            digest: hash of everything that must be equal on all ranks, in [0, 2^62).
            shards: this rank's shard of each weight; the ranks' shards together must make up the weights.
            gradient_checksum: a number in [0, 2^62) for the caller to compare.
            failed: this rank has an error of its own, which the caller will raise.

        Returns:
            Every rank's ``gradient_checksum``; empty where this rank ``failed``.

        Raises:
            ValueError: another rank failed, digests differ (the message names the ranks), or elements are covered
                twice or not at all (it names the weights).
        """
        table = torch.zeros(self.size + 1, 3, dtype=torch.int64)
        table[self.rank] = torch.tensor([digest, gradient_checksum, 2 * self._call + failed])
        table[self.size, 0] = sum(self._coverage_excess(name, shard) for name, shard in shards.items()) % MODULUS
        rows = self.finish(self.start(table.to(self.device))).tolist()
        self._adopt_count(max(row[2] // 2 for row in rows[: self.size]))
        if failed:
            return []
        failing = [i for i in range(self.size) if rows[i][2] % 2]
        if failing:
            raise ValueError(
                f"{self._name_ranks(failing)} refused this call for a reason that it raises itself; no rank has gone on"
            )
        digests = [row[0] for row in rows[: self.size]]
        if len(set(digests)) > 1:
            common = max(set(digests), key=digests.count)
            deviating = self._name_ranks([i for i, other in enumerate(digests) if other != common])
            raise ValueError(
                f"anchors: got others on {deviating} than on the rest of {self.size} ranks (names, shapes, ranks, "
                "forms, dtypes, contents, W0, what is frozen or coeff differ), expected the same call with the same "
                "anchors on every rank: make them together (Anchors.from_model on all ranks), or load one file on all "
                "of them"
            )
        if rows[self.size][0] % MODULUS:
            self._raise_uncovered(shards)
        return [row[1] for row in rows[: self.size]]

    def start(self, tensor: Tensor) -> PendingSum:
        """Begin to sum ``tensor`` over the ranks, in place."""
        sent = tensor if self._wire is None else tensor.to(self._wire)
        try:
            return PendingSum(tensor, sent, dist.all_reduce(sent, group=self.group, async_op=True))
        except RuntimeError as error:
            raise self._diagnose_failure(error) from error

    def finish(self, pending: PendingSum) -> Tensor:
        """Wait for the sum (on a GPU: make the current stream wait)."""
        try:
            pending.work.wait()
        except RuntimeError as error:
            raise self._diagnose_failure(error) from error
        if pending.sent is not pending.tensor:
            pending.tensor.copy_(pending.sent)
        return pending.tensor

    def check_health(self, health: Sequence[float]) -> None:
        """Raise unless every rank's number is finite.

        Raises:
            ValueError: names the ranks whose weights are not, or those that have ``FAILED``.
        """
        failed = [i for i, value in enumerate(health) if value == FAILED]
        if failed:
            raise ValueError(
                f"{self._name_ranks(failed)} failed in the middle of this call, for a reason that it raises itself; no "
                "gradient was changed"
            )
        non_finite = [i for i, value in enumerate(health) if not abs(value) < float("inf")]
        if non_finite:
            raise ValueError(
                f"weights: got NaN or infinity in the drifts of {self._name_ranks(non_finite)}, expected finite "
                "weights on every rank; no gradient was changed"
            )

    def _coverage_excess(self, name: str, shard: Shard) -> int:
        """Measure the shard; the first rank subtracts the whole weight. Ranks' shards that cover it sum to 0."""
        return measure(name, shard) - (measure(name, Shard.whole(shard.shape)) if self.rank == 0 else 0)

    def _raise_uncovered(self, shards: Mapping[str, Shard]) -> None:
        # All ranks get here, with the same names, because their digests were equal.
        own = [[self._coverage_excess(name, shard) % MODULUS, shard.numel] for name, shard in shards.items()]
        totals = self.finish(self.start(torch.tensor(own, dtype=torch.int64).to(self.device))).tolist()
        wrong = [
            f"{name} ({count} of {shard.shape[0] * shard.shape[1]} elements)"
            for (name, shard), (excess, count) in zip(shards.items(), totals, strict=True)
            if excess % MODULUS
        ]
        shown = ", ".join(wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise ValueError(
            f"anchors: got parts that do not make up the whole weights: {shown}; expected each element on exactly one "
            "rank: make or load the anchors with this model as it is sharded now"
        )

    def _name_ranks(self, members: Sequence[int]) -> str:
        ranks = [str(dist.get_global_rank(self.group, member)) for member in members]
        return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(ranks)

    def _key(self, member: int) -> str:
        # The global rank is part of the key, because groups that were split off together share one name.
        return f"rpsft_kernels/{self.group.group_name}/{dist.get_global_rank(self.group, member)}"

    def _report(self) -> None:
        """Record in the job's store that this rank reached this call."""
        store = default_store()
        try:
            if store is not None:
                store.set(self._key(self.rank), str(self._call))
        except RuntimeError:
            # The process that keeps the store is gone. The next sum fails, with a fuller message.
            pass

    def _adopt_count(self, call: int) -> None:
        if call > self._call:
            _calls[self.group.group_name] = self._call = call
            self._report()

    def _diagnose_failure(self, error: RuntimeError) -> RuntimeError:
        """Make the error to raise when the group failed; it names the missing ranks that the job's store knows of."""
        answers: list[str] = []
        # A thread asks, because a store whose keeper is gone may never answer.
        thread = threading.Thread(target=lambda: answers.append(self._missing_ranks()), daemon=True)
        thread.start()
        thread.join(2 * _REPORT_SECONDS)
        diagnosis = answers[0] if answers else "the job's store, which rank 0 or the launcher keeps, does not answer"
        return RuntimeError(
            f"rotation penalty: the sum over {self.size} ranks failed on rank {dist.get_rank()}: {diagnosis}; no "
            f"gradient was changed. The process group said: {error}"
        )

    def _missing_ranks(self) -> str:
        store = default_store()
        if store is None:
            return "which rank is missing is not known"
        others = [member for member in range(self.size) if member != self.rank]
        # Ranks that are alive fail as this one does, and report it under these keys.
        reports = {member: f"{self._key(member)}/{self._call}/lost" for member in range(self.size)}
        absent: list[int] = []
        silent: list[int] = []
        try:
            store.set(reports[self.rank], "1")
            until = time.monotonic() + _REPORT_SECONDS
            while not store.check([reports[member] for member in others]) and time.monotonic() < until:
                time.sleep(_POLL_SECONDS)
            for member in others:
                if not store.check([reports[member]]):
                    key = self._key(member)
                    arrived = store.check([key]) and int(store.get(key)) >= self._call
                    (silent if arrived else absent).append(member)
        except RuntimeError:
            if not absent and not silent:
                return "the job's store, which rank 0 or the launcher keeps, is gone too"
        # Silent ranks may only be waiting: their backend has not reported the failure to them yet.
        if absent:
            return f"{self._name_ranks(absent)} never came to this call"
        if len(silent) == 1:
            return f"{self._name_ranks(silent)} came to this call and fell silent in the middle of it"
        if silent:
            return f"at least one of {self._name_ranks(silent)} came to this call and stopped in the middle of it"
        return "every rank came to this call and lost its connections to the others"
