"""Counts what each rank sends in both calls, where torch.distributed is entered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

import rpsft_kernels as rk
from exchange_ranks import CALLS, backward, layers
from exchange_ranks import wrapped as wrapped_layers
from fsdp2_ranks import wrapped
from llama import RANK, llama, own_batch, task_loss
from rpsft_kernels.distributed import GroupCall, PendingSum
from rpsft_kernels.evaluation import bucket as buckets
from rpsft_kernels.evaluation.pairing import pair
from rpsft_kernels.ops import BucketLimits
from rpsft_kernels.ops import buckets as ops_buckets

# The functions that move tensors or objects between ranks.
_MOVERS = [
    name
    for name in dir(dist)
    if name.startswith(("all_", "reduce", "_all_", "_reduce", "broadcast", "gather", "scatter", "batch_isend"))
    or name
    in ("send", "recv", "isend", "irecv", "send_object_list", "recv_object_list", "barrier", "monitored_barrier")
]


@dataclass
class Traffic:
    """One call's traffic: calls of torch.distributed, elements and bytes of each all-reduce, DTensor's messages."""

    called: list[str] = field(default_factory=list)
    sizes: list[tuple[str, int, int]] = field(default_factory=list)
    by_dtensor: int = 0
    # "project", "start" (of a bucket's sum or one of scalars) and "finish", in their order.
    events: list[str] = field(default_factory=list)


@dataclass
class Counted:
    """Return the traffic of each call by name, and the sizes to judge it by."""

    traffic: dict[str, Traffic]
    buckets: int
    projected: int


def _count(call: Callable[..., Tensor], model: Any, anchors: rk.Anchors) -> Traffic:
    traffic = Traffic()
    with pytest.MonkeyPatch.context() as patch:
        for name in _MOVERS:
            function = getattr(dist, name)
            if callable(function):
                patch.setattr(dist, name, _counting(traffic, name, function))
        for owner, name in ((buckets.Bucket, "project"), (GroupCall, "start"), (GroupCall, "finish")):
            patch.setattr(owner, name, _noting(traffic, name, getattr(owner, name)))
        with CommDebugMode() as mode:
            call(model, anchors)
    # Calls through dist are traced by it as c10d's operators as well: what is more than those came from elsewhere.
    traffic.by_dtensor = mode.get_total_counts() - traffic.called.count("all_reduce")
    return traffic


def _counting(traffic: Traffic, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*arguments: Any, **options: Any) -> Any:
        traffic.called.append(name)
        for tensor in arguments[:1]:
            if isinstance(tensor, Tensor):
                traffic.sizes.append((str(tensor.dtype), tensor.numel(), tensor.nbytes))
        return function(*arguments, **options)

    return counted


def _noting(traffic: Traffic, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def noted(self: Any, *arguments: Any) -> Any:
        tensor = arguments[0].tensor if arguments and isinstance(arguments[0], PendingSum) else None
        sent = arguments[0] if tensor is None and arguments and isinstance(arguments[0], Tensor) else tensor
        what = ""
        if sent is not None:
            what = " table" if sent.dtype == torch.int64 else " scalars" if sent.numel() == 1 + self.size else " C"
        traffic.events.append(name + what)
        return function(self, *arguments)

    return noted


def sharded(drift_bytes: int) -> Counted:
    """Count the traffic of the small Llama under FSDP2."""
    with pytest.MonkeyPatch.context() as patch:
        limits = BucketLimits(drift_bytes=drift_bytes, one_orientation=False)
        patch.setattr(ops_buckets, "CPU_LIMITS_OF_SHARDS", limits)
        model = wrapped(llama())
        anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
        task_loss(model, own_batch()).backward()
        summed = [bucket for bucket in buckets.make_buckets(pair(model, anchors)) if bucket.summed]
        traffic = {name: _count(call, model, anchors) for name, call in CALLS.items()}
        projected = sum(anchor.form != "full" for anchor in anchors.values())
        return Counted(traffic, len(summed), projected)


def replicated() -> Counted:
    """Count the traffic of weights under DistributedDataParallel, of which none is cut."""
    model = wrapped_layers("ddp", layers((24, 24, 24, 24)))
    anchors = rk.Anchors.from_model(model, 8, progress=False, basis_dtype=torch.float32)
    backward(model)
    return Counted({name: _count(call, model, anchors) for name, call in CALLS.items()}, 0, 3)
