"""Gradients that share memory: one that overlaps itself is replaced by a copy, two that overlap are refused."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distributed import ReplicatedWeight
from .overlap import find_overlap, lie_apart, overlaps_itself
from .pairing import AnchoredWeight

# For each plan, where the gradients lay that were last found to share no memory.
_apart: weakref.WeakKeyDictionary[Any, list[tuple[object, ...]]] = weakref.WeakKeyDictionary()


class GradientMemory:
    """The memory of the gradients that one call adds to.

    Args:
        weights: the weights of the call.
    """

    def __init__(self, weights: Sequence[AnchoredWeight]) -> None:
        self._weights = weights
        self._replaced: dict[int, Tensor] = {}
        self._added: list[tuple[list[int], list[Tensor]]] = []
        self._facts: list[tuple[object, ...]] = []
        self._checked = False

    def add(self, indices: list[int], grads: list[Tensor], sharded: bool) -> list[Tensor]:
        """Take note of gradients; returns those to be added to, with copies for such as overlap themselves.

        Args:
            indices: places of their weights in the call.
            grads: the gradients, as :meth:`LocalWeight.gradient` returned them.
            sharded: whether the weights lie over several processes.

        Raises:
            ValueError: a gradient overlaps itself, and its wrapper holds it.
        """
        if self._checked:
            # These are copies, which are taken when they are computed.
            return grads
        memory = [self._whole(i, grad) for i, grad in zip(indices, grads, strict=True)] if sharded else grads
        strides = None
        if not all(map(Tensor.is_contiguous, memory)):
            if any(map(overlaps_itself, memory)):
                grads = list(map(self._separate, indices, grads))
                memory = [self._whole(i, grad) for i, grad in zip(indices, grads, strict=True)]
            strides = [tensor.stride() for tensor in memory]
        try:
            starts = list(map(Tensor.data_ptr, memory))
        except RuntimeError:
            return grads
        if not all(starts) and any(start == 0 and tensor.numel() for start, tensor in zip(starts, memory, strict=True)):
            # Tensors without memory of their own, such as fake ones.
            return grads
        self._added.append((indices, memory))
        self._facts.append((indices, memory[0].dtype, memory[0].device, starts, strides))
        return grads

    def check(self, plan: object) -> None:
        """Raise a ValueError if two of the gradients share memory; ``plan`` is that of the call."""
        added, self._added, self._checked = self._added, [], True
        if not added or _apart.get(plan) == self._facts:
            return
        devices: dict[torch.device, list[tuple[int, Tensor]]] = {}
        for indices, memory in added:
            devices.setdefault(memory[0].device, []).extend(zip(indices, memory, strict=True))
        for members in devices.values():
            if not lie_apart([tensor for _, tensor in members]):
                self._check_overlap(members)
        _apart[plan] = self._facts

    def _check_overlap(self, members: Sequence[tuple[int, Tensor]]) -> None:
        """Raise a ValueError if two gradients of a device share memory, given with the places of their weights."""
        # A weight that is listed twice has one gradient.
        firsts = {self._weights[i].weight.identity: (i, tensor) for i, tensor in reversed(members)}
        places, tensors = zip(*reversed(firsts.values()), strict=True)
        found = find_overlap(tensors)
        if found is not None:
            first, second = (f"{self._weights[places[place]].name}.grad" for place in found)
            raise ValueError(
                f"{second}: got a gradient that shares memory with {first}, expected memory of its own: what is "
                f"added to one would reach the other; copy it: {second} = {second}.clone()"
            )

    def restore(self) -> None:
        """Put back the gradients that were replaced and not computed."""
        for i, grad in self._replaced.items():
            self._weights[i].weight.parameter.grad = grad
        self._replaced, self._added = {}, []

    def keep(self, computed: Sequence[int] | None) -> None:
        """Keep the copies for the weights at these places, which are computed now; None keeps all."""
        if self._replaced:
            keys = self._replaced if computed is None else computed
            self._replaced = {i: grad for i, grad in self._replaced.items() if i not in keys}

    def _whole(self, i: int, grad: Tensor) -> Tensor:
        """Return all of the gradient that lies here: of a replicated weight, more than this process adds to."""
        weight = self._weights[i].weight
        if isinstance(weight, ReplicatedWeight) and weight.parameter.grad is not None:
            return weight.parameter.grad
        return grad

    def _separate(self, i: int, grad: Tensor) -> Tensor:
        if not overlaps_itself(self._whole(i, grad)):
            return grad
        name, weight = self._weights[i].name, self._weights[i].weight
        held = weight.parameter.grad
        if held is None or not weight.differentiable:
            raise ValueError(
                f"{name}.grad: got elements that share memory (an expanded tensor, or overlapping windows), expected "
                f"memory for each: the shard's gradient is its wrapper's; copy it: {name}.grad = {name}.grad.clone()"
            )
        self._replaced[i] = held
        # The memory itself is left as it is: it may be a number that the user has expanded.
        weight.parameter.grad = held.clone()
        return weight.gradient()
