"""DeepSpeed ZeRO-3: the weights that it partitions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..private_names import Zero3Parameter
from .flat_shard import FlatShardWeight
from .masters import replace_by_masters
from .shard import Shard
from .weight import LocalWeight


@dataclass(frozen=True)
class ZeroWeight(FlatShardWeight):
    """A parameter that DeepSpeed ZeRO-3 has partitioned; its gradient is reached through DeepSpeed's ``safe_*``."""

    @property
    def _zero3(self) -> Zero3Parameter:
        return Zero3Parameter(self.parameter)

    @property
    def device(self) -> torch.device:
        return self._zero3.partition.device

    @property
    def is_copy(self) -> bool:
        return self.dtype.itemsize == 2 and self.requires_grad and self._zero3.has_optimizer

    @property
    def master(self) -> LocalWeight:
        if not self.is_copy or self._zero3.master is None:
            return self
        return ZeroMasterWeight(self.parameter, self.shape, self.shard, self.group, self.grad_scale)

    @property
    def copies_gradient(self) -> bool:
        return True

    def drop_gradient(self) -> None:
        """Leave the gradient in place, as DeepSpeed has made it."""

    @property
    def must_accumulate(self) -> bool:
        return self._zero3.has_gradient

    @property
    def gradient_dtype(self) -> torch.dtype:
        return torch.float32

    def values(self) -> Tensor:
        return self.view_shard(self._zero3.partition.detach())

    def check_gradient(self, name: str) -> None:
        if not self.requires_grad:
            return
        if not self._zero3.has_optimizer:
            raise ValueError(f"{name}: got a parameter without DeepSpeed's optimizer; call deepspeed.initialize first")
        if not self._zero3.ready:
            # DeepSpeed's next backward pass would overwrite a gradient that is added to now.
            raise ValueError(
                f"{name}: got a DeepSpeed ZeRO-3 parameter without a gradient for the next step, expected this call "
                "between engine.backward of the last micro-batch and engine.step"
            )

    def gradient(self) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        return self.view_shard(safe_get_local_grad(self.parameter))

    def write_back(self, gradient: Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        # The last ranks' partitions are padded.
        padded = gradient.new_zeros(self._zero3.partition.numel())
        padded[: gradient.numel()] = gradient.reshape(-1)
        safe_set_local_grad(self.parameter, padded)
        self._zero3.mark_gradient()


class ZeroMasterWeight(ZeroWeight):
    """The same parameter at its optimizer's float32 masters. Only a call that computes R reads these."""

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
        return ZeroWeight(self.parameter, self.shape, self.shard, self.group, self.grad_scale)

    def values(self) -> Tensor:
        master = self._zero3.master
        assert master is not None
        copy, master = super().values(), self.view_shard(master)
        return replace_by_masters(copy, master)


def locate_zero3(zero3: Zero3Parameter) -> ZeroWeight:
    """Locate the shard of a ZeRO-3 parameter that lies here: ranks have partitions of equal length, in their order."""
    shape, group, length, total = zero3.shape, zero3.group, zero3.partition_numel, zero3.numel
    begin = min(total, length * group.rank())
    if group.size() > 1:
        shard = Shard.range(shape, begin, min(total, begin + length))  # type: ignore[arg-type]
    else:
        shard, group = Shard.whole(shape), None  # type: ignore[arg-type]
    return ZeroWeight(zero3.parameter, shape, shard, group, zero3.loss_scale)
