"""The base of weights whose shard is a range of a wrapper's flat tensor: FSDP1 and DeepSpeed ZeRO-3."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .weight import LocalWeight


@dataclass(frozen=True)
class FlatShardWeight(LocalWeight):
    """A weight of which a flat tensor holds the shard here. The wrapper gathers and frees the whole within a step."""

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def lasting(self) -> bool:
        return False

    def state(self) -> tuple[object, ...]:
        # The parameter's shape does not count: it is that of the whole while the parameter is gathered.
        return self.dtype, self.device, self.requires_grad

    def view_shard(self, flat: Tensor, begin: int = 0) -> Tensor:
        """View the shard, of ``shard.local_shape``, that begins at element ``begin`` of ``flat``."""
        return flat.reshape(-1)[begin : begin + self.shard.numel].view(self.shard.local_shape)
