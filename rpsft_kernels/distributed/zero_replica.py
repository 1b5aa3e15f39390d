"""DeepSpeed ZeRO-1 and 2, and its bfloat16 optimizer: replicas in 16 bits, of which each rank has some float32 masters.

A rank's optimizer trains a range of all parameters of a group, laid end to end. Each rank's share of the work is what
of a weight lies in its range, so that R and its gradient can be computed at the masters without any of them being sent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..private_names import MasterRange, find_master_range
from .masters import replace_by_masters
from .shard import Shard
from .weight import LocalWeight, ReplicatedWeight


def _find_no_engine() -> None:
    return None


@dataclass(frozen=True)
class ZeroReplica(ReplicatedWeight):
    """A parameter of a DeepSpeedEngine that every rank of the group holds whole.

    ``engine`` returns the engine; None where it is gone.
    """

    engine: Callable[[], Any] = _find_no_engine

    @property
    def _range(self) -> MasterRange | None:
        engine = self.engine() if self.parameter.dtype.itemsize == 2 else None
        return None if engine is None else find_master_range(engine, self.parameter, self.group)

    @property
    def own_share(self) -> Shard | None:
        found = self._range
        if found is None:
            return None
        m, n = self.shape
        if self.group is None:
            # One rank has all masters.
            return Shard.whole((m, n))
        if not found.undivided:
            shard = Shard.range((m, n), found.begin, found.end)
        elif found.begin < found.end:
            shard = Shard.whole((m, n))
        else:
            shard = Shard.nothing((m, n), unsharded=True)
        return dataclasses.replace(shard, division=found.division)

    @property
    def master(self) -> LocalWeight:
        # Anchors may be of another division of the work: of one from before there were masters, say. All ranks must
        # find that, also one whose share is empty in both.
        return ZeroReplicaMaster(**vars(self)) if self.own_share == self.shard else self

    def state(self) -> tuple[object, ...]:
        return *super().state(), self.own_share


class ZeroReplicaMaster(ZeroReplica):
    """The same parameter at its optimizer's float32 masters, of which the gradient goes on to the parameter."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def is_copy(self) -> bool:
        return False

    @property
    def master(self) -> LocalWeight:
        return self

    @property
    def shown(self) -> LocalWeight:
        return ZeroReplica(**vars(self))

    def values_in(self, parameter: Tensor) -> Tensor:
        found = self._range
        assert found is not None
        copy = super().values_in(parameter)
        values: Tensor = _AtMasters.apply(copy, found.masters.view(copy.shape))  # type: ignore[no-untyped-call, unused-ignore]
        return values


class _AtMasters(torch.autograd.Function):
    """Replaces values of a parameter by its masters' where these round to them; the gradient is the parameter's."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, masters: Tensor) -> Tensor:
        ctx.dtype = copy.dtype
        return replace_by_masters(copy, masters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.to(ctx.dtype), None
