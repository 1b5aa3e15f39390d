"""FSDP1: the weights that a FlatParameter concatenates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..private_names import Fsdp1Handle, Fsdp1Weight
from .shard import Shard
from .weight import LocalWeight


@dataclass(frozen=True)
class FlatParameterWeight(LocalWeight):
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

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def lasting(self) -> bool:
        return False

    def state(self) -> tuple[object, ...]:
        return self.dtype, self.device, self.requires_grad

    def drop_gradient(self) -> None:
        self._holder.grad = None

    @property
    def must_accumulate(self) -> bool:
        # What is new in a FlatParameter is zeros: its other weights have no gradient here.
        return self.place.original is None or self.place.original.grad is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        # Not that of the gradient at hand: a rank that holds nothing of a weight has none, and must say the same.
        reduced = self.handle.reduced_dtype
        return self.dtype if reduced is None else reduced

    def _slice(self, flat: Tensor) -> Tensor:
        offset = self.place.offset
        return flat.reshape(-1)[offset : offset + self.shard.numel].view(self.shard.local_shape)

    def values(self) -> Tensor:
        if self.handle.gathered:
            raise ValueError(
                f"weights: got FSDP1 parameters that are gathered now ({', '.join(self.handle.names[:3])}), expected "
                "them sharded: make this call after the backward pass"
            )
        return self._slice(self.parameter.detach())

    def check_gradient(self, name: str) -> None:
        self.values()
        if self.handle.between_passes:
            raise ValueError(
                f"{name}: got an FSDP1 parameter between its forward and its backward pass, expected it sharded: make "
                "this call after the backward pass"
            )
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
                # As FSDP1 itself gives a parameter a gradient of another dtype.
                holder.grad.data = holder.grad.to(self.gradient_dtype)
        if self.place.original is None:
            return self._slice(holder.grad)
        return holder.grad.reshape(self.shard.local_shape)


def find_flat_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], LocalWeight]]:
    """(path, shape of the whole, weight as it lies here) of every parameter that FSDP1 flattens.

    Tied weights come once under each of their names.
    """
    for path, module in model.named_modules():
        handle = Fsdp1Handle.of(module)
        if handle is None:
            continue
        prefix = path + "." if path else ""
        weights = {place.name: (place.shape, _locate(handle, place)) for place in handle.weights}
        for name, primary in handle.tied:
            weights[name] = weights[primary]
        for name, (shape, weight) in weights.items():
            yield prefix + name, shape, weight


def _locate(handle: Fsdp1Handle, place: Fsdp1Weight) -> LocalWeight:
    if len(place.shape) != 2:
        # Only the shape is ever asked for of a parameter that is no matrix.
        shard = Shard.whole((1, 1)) if handle.group is None else Shard.nothing((1, 1))
    elif handle.group is None:
        shard = Shard.whole((place.shape[0], place.shape[1]))
    else:
        shard = Shard.range((place.shape[0], place.shape[1]), place.begin, place.end)
    return FlatParameterWeight(handle.parameter, place.shape, shard, handle.group, handle=handle, place=place)
