"""FSDP1: the weights that a FlatParameter concatenates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..private_names import Fsdp1Handle, Fsdp1Weight
from .flat_shard import FlatShardWeight
from .gradient_hooks import reason_consumed
from .shard import Shard


@dataclass(frozen=True)
class FlatParameterWeight(FlatShardWeight):
    """One of the weights that an FSDP1 FlatParameter concatenates; ``parameter`` is the FlatParameter."""

    handle: Fsdp1Handle = field(kw_only=True)
    place: Fsdp1Weight = field(kw_only=True)

    @property
    def identity(self) -> int:
        return hash((id(self.parameter), self.place.name))

    @property
    def _holder(self) -> Tensor:
        """The module's own parameter, a view of the shard, where FSDP1 keeps it (``use_orig_params=True``)."""
        return self.parameter if self.place.original is None else self.place.original

    @property
    def requires_grad(self) -> bool:
        return self._holder.requires_grad

    def drop_gradient(self) -> None:
        self._holder.grad = None

    @property
    def must_accumulate(self) -> bool:
        # The gradient of a FlatParameter is made of zeros, as its other weights have no gradient here.
        return self.place.original is None or self.place.original.grad is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        # A gradient at hand does not decide: a rank with an empty shard has none, and must give the same answer.
        reduced = self.handle.reduced_dtype
        return self.dtype if reduced is None else reduced

    def values(self) -> Tensor:
        if self.handle.gathered:
            raise ValueError(
                f"weights: got FSDP1 parameters that are gathered now ({', '.join(self.handle.names[:3])}), expected "
                "them sharded: make this call after the backward pass"
            )
        return self.view_shard(self.parameter.detach(), self.place.offset)

    def check_gradient(self, name: str) -> None:
        self.values()
        if self.handle.between_passes:
            raise ValueError(
                f"{name}: got an FSDP1 parameter between its forward and its backward pass, expected it sharded: make "
                "this call after the backward pass"
            )
        reason = reason_consumed(self._holder) if self.requires_grad else None
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        grad = self._holder.grad
        expected = self._holder.numel()
        if grad is not None and grad.numel() != expected:
            raise ValueError(
                f"{name}.grad: got {grad.numel()} elements, expected the {expected} of this rank's shard: make this "
                "call after the backward pass that reduces gradients (outside no_sync)"
            )

    @torch.no_grad()
    def gradient(self) -> Tensor:
        holder = self._holder
        if holder.grad is None:
            holder.grad = torch.zeros_like(holder)
            if self.gradient_dtype != holder.dtype:
                # FSDP1 itself gives a parameter a gradient of another dtype in this way.
                holder.grad.data = holder.grad.to(self.gradient_dtype)
        if self.place.original is None:
            return self.view_shard(holder.grad, self.place.offset)
        return holder.grad.reshape(self.shard.local_shape)


def find_flat_parameters(model: nn.Module) -> Iterator[tuple[str, FlatParameterWeight]]:
    """Find every parameter that FSDP1 flattens: its path, and the weight as it lies here.

    A tied weight comes once under each of its names.
    """
    for path, module in model.named_modules():
        handle = Fsdp1Handle.of(module)
        if handle is None:
            continue
        prefix = path + "." if path else ""
        weights = {place.name: _locate(handle, place) for place in handle.weights}
        for name, primary in handle.tied:
            weights[name] = weights[primary]
        for name, weight in weights.items():
            yield prefix + name, weight


def _locate(handle: Fsdp1Handle, place: Fsdp1Weight) -> FlatParameterWeight:
    if len(place.shape) != 2:
        # A parameter that is no matrix is never anchored: only its shape is read.
        shard = Shard.whole((1, 1)) if handle.group is None else Shard.nothing((1, 1))
    elif handle.group is None:
        shard = Shard.whole((place.shape[0], place.shape[1]))
    else:
        shard = Shard.range((place.shape[0], place.shape[1]), place.begin, place.end)
    return FlatParameterWeight(handle.parameter, place.shape, shard, handle.group, handle=handle, place=place)
