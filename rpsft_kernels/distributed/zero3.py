"""DeepSpeed ZeRO-3's partitions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..private_names import Zero3Parameter
from .shard import Shard
from .weight import LocalWeight


@dataclass(frozen=True)
class ZeroWeight(LocalWeight):
    """A parameter that DeepSpeed ZeRO-3 has partitioned; its gradient is reached through DeepSpeed's ``safe_*``."""

    @property
    def _zero3(self) -> Zero3Parameter:
        return Zero3Parameter(self.parameter)

    @property
    def device(self) -> torch.device:
        return self._zero3.partition.device

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def lasting(self) -> bool:
        return False

    @property
    def copies_gradient(self) -> bool:
        return True

    def state(self) -> tuple[object, ...]:
        return self.dtype, self.device, self.requires_grad

    def drop_gradient(self) -> None:
        """DeepSpeed has made it."""

    @property
    def must_accumulate(self) -> bool:
        return self._zero3.has_gradient

    @property
    def gradient_dtype(self) -> torch.dtype:
        return torch.float32

    def values(self) -> Tensor:
        return self._zero3.partition.detach()[: self.shard.numel].view(self.shard.local_shape)

    def check_gradient(self, name: str) -> None:
        if not self.requires_grad:
            return
        if not self._zero3.has_optimizer:
            raise ValueError(f"{name}: got a parameter without DeepSpeed's optimizer; call deepspeed.initialize first")
        if not self._zero3.ready:
            # DeepSpeed's next backward pass would write over what is added now.
            raise ValueError(
                f"{name}: got a DeepSpeed ZeRO-3 parameter without a gradient for the next step, expected this call "
                "between engine.backward of the last micro-batch and engine.step"
            )

    def gradient(self) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        gradient: Tensor = safe_get_local_grad(self.parameter)
        return gradient.reshape(-1)[: self.shard.numel].view(self.shard.local_shape)

    def write_back(self, gradient: Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        # The last ranks' partitions are padded.
        padded = gradient.new_zeros(self._zero3.partition.numel())
        padded[: gradient.numel()] = gradient.reshape(-1)
        safe_set_local_grad(self.parameter, padded)
        self._zero3.mark_gradient()


def locate_zero3(zero3: Zero3Parameter) -> ZeroWeight:
    """The shard of a ZeRO-3 parameter that lies here: partitions of equal length in the order of ranks."""
    shape, group, length, total = zero3.shape, zero3.group, zero3.partition_numel, zero3.numel
    begin = min(total, length * group.rank())
    if group.size() > 1:
        shard = Shard.range(shape, begin, min(total, begin + length))  # type: ignore[arg-type]
    else:
        shard, group = Shard.whole(shape), None  # type: ignore[arg-type]
    return ZeroWeight(zero3.parameter, shape, shard, group, zero3.loss_scale)
