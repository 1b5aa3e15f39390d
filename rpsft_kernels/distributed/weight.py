"""One weight as this rank holds it, whatever wraps it: its values, its gradient, and the group that sums its C."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..private_names import is_linked_by_deepspeed
from .gradient_hooks import reason_consumed
from .shard import Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


def _reason_unread(parameter: Tensor) -> str | None:
    """Say why nobody would read what is added to the parameter's ``.grad``; None if nothing is known against it."""
    # Megatron and Transformer Engine document this attribute.
    if getattr(parameter, "main_grad", None) is not None:
        return (
            "got a parameter whose gradient is its main_grad (Megatron, Transformer Engine), expected one whose "
            "optimizer reads .grad: pass a detached copy of the weight that requires grad, and add the copy's .grad to "
            "main_grad"
        )
    if is_linked_by_deepspeed(parameter):
        return (
            "got a parameter whose gradient DeepSpeed (ZeRO-1/2, or its bfloat16 optimizer) keeps to itself, expected "
            "one whose optimizer reads .grad: put rotation_penalty of the engine into the loss of engine.backward; if "
            "that engine is gone, delete what it has left on the parameter (_hp_mapping)"
        )
    # Hooks that a compiled call met are in its graph.
    return None if torch.compiler.is_compiling() or not parameter.requires_grad else reason_consumed(parameter)


@dataclass(frozen=True)
class LocalWeight:
    """A tensor that lies whole in this process, and the base class of weights that do not.

    Attributes:
        parameter: the tensor that has the gradient; tied weights share it.
        shape: (m, n) of the whole weight.
        shard: the elements that this process works on.
        group: the processes whose shards make up the whole; None where this one works on all of it.
        grad_scale: factor by which the gradient of this process's shard is multiplied.
    """

    parameter: Tensor
    shape: tuple[int, ...]
    shard: Shard
    group: ProcessGroup | None = None
    grad_scale: float = 1.0

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    @property
    def is_copy(self) -> bool:
        """Whether the parameter is a copy in 16 bits of a master that DeepSpeed's optimizer keeps and trains."""
        return self.dtype.itemsize == 2 and is_linked_by_deepspeed(self.parameter)

    @property
    def master(self) -> LocalWeight:
        """The weight at the float32 values that its optimizer trains, where the parameter is a 16-bit copy of them.

        The weight itself where the parameter is no copy, or where the masters are out of reach.
        """
        return self

    @property
    def shown(self) -> LocalWeight:
        """The weight at the values of the model's parameter: the opposite of :attr:`master`."""
        return self

    @property
    def requires_grad(self) -> bool:
        return self.parameter.requires_grad

    @property
    def group_name(self) -> str:
        """Name of the process group; empty where this process works on the whole weight."""
        return "" if self.group is None else self.group.group_name

    @property
    def identity(self) -> int:
        """Equal for tied weights."""
        return id(self.parameter)

    @property
    def differentiable(self) -> bool:
        """Whether :meth:`values` are connected to the parameter by autograd."""
        return True

    @property
    def lasting(self) -> bool:
        """Whether the same parameter is the same weight at the next call, provided that :meth:`state` is equal."""
        return True

    def state(self) -> tuple[object, ...]:
        """Return every property that may change while a parameter stays the same object."""
        parameter = self.parameter
        layout = parameter.shape, parameter.dtype, parameter.device, parameter.layout
        return *layout, parameter.requires_grad, parameter.is_neg()

    def without_parameter(self) -> Self:
        """Return the weight without its parameter, for a holder that must not keep the parameter alive."""
        return self.with_parameter(None)

    def with_parameter(self, parameter: Tensor | None) -> Self:
        """Return the weight with its parameter again."""
        # dataclasses.replace takes ten times as long, and this runs for every weight of every step.
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        copy.__dict__["parameter"] = parameter
        return copy

    def with_work(self, shard: Shard | None) -> LocalWeight:
        """Return the weight with ``shard`` as this process's share of the work, where that is free to choose.

        Only a replicated weight (:class:`ReplicatedWeight`) leaves the choice; any other weight, and None, change
        nothing.

        Raises:
            ValueError: a replica's work cannot be divided, because its gradient would not be averaged.
        """
        return self

    def values(self) -> Tensor:
        """Return the shard's values, of ``shard.local_shape``."""
        return self.parameter

    def values_in(self, parameter: Tensor) -> Tensor:
        """Return the values of :meth:`values`, connected to a tensor that stands for the whole parameter."""
        return self.shard.of(parameter)

    @property
    def must_accumulate(self) -> bool:
        return self.parameter.grad is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Dtype of the gradient, or of the one that :meth:`gradient` would make."""
        if self.parameter.grad is not None:
            return self.parameter.grad.dtype
        dtype: torch.dtype | None = getattr(self.parameter, "grad_dtype", None)
        return self.dtype if dtype is None else dtype

    def check_gradient(self, name: str) -> None:
        """Raise a ValueError unless the shard of the gradient can be added to now, and is read by someone."""
        grad, parameter = self.parameter.grad, self.parameter
        reason = _reason_unread(parameter)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        if grad is None:
            return
        if grad.layout != torch.strided:
            raise ValueError(
                f"{name}.grad: got layout {grad.layout}, expected a dense gradient "
                "(torch.nn.Embedding(sparse=False)); or leave this weight out of the anchors"
            )
        if grad.shape != parameter.shape or grad.device != parameter.device:
            raise ValueError(
                f"{name}.grad: got shape {tuple(grad.shape)} on {grad.device}, expected {tuple(parameter.shape)} on "
                f"{parameter.device} like the weight, which has other data since; clear it: {name}.grad = None"
            )
        if grad.is_neg():
            raise ValueError(
                f"{name}.grad: got a view that stands for its memory's negative, expected the numbers themselves; "
                f"resolve it: {name}.grad = {name}.grad.resolve_neg()"
            )

    @property
    def copies_gradient(self) -> bool:
        """Whether :meth:`gradient` gives a copy, which takes memory until it is written back."""
        return False

    def gradient(self) -> Tensor:
        """Return the shard of the gradient, of ``shard.local_shape``, to be added to; a new one is not initialised."""
        if self.parameter.grad is None:
            self.parameter.grad = torch.empty_like(self.parameter, dtype=self.gradient_dtype)
        return self.parameter.grad

    def drop_gradient(self) -> None:
        """Take away a gradient that :meth:`gradient` has made in a call that fails."""
        self.parameter.grad = None

    def ensure_gradient(self) -> None:
        """Make the gradient of an empty shard where it must exist all the same. Replaces :meth:`gradient` there."""

    def write_back(self, gradient: Tensor) -> None:
        """Store the gradient that :meth:`gradient` gave, where that was a copy."""


@dataclass(frozen=True)
class ReplicatedWeight(LocalWeight):
    """A weight that every rank of ``group`` holds whole and whose gradients its wrapper averages.

    The work is divided: this rank computes its shard alone, and multiplies that shard's gradient by the group's size.
    ``gradient_error`` says why gradients cannot be added to; it is empty where they can. ``work_error`` says why the
    work cannot be divided, and ``reason_lost`` why the wrapper might not average what is added to a gradient.
    ``replicas`` returns the parameters whose gradients the wrapper averages, this one among them.
    """

    gradient_error: str = ""
    work_error: str = ""
    reason_lost: Callable[[], str] = str
    replicas: Callable[[], Sequence[Tensor]] = tuple

    @property
    def divided(self) -> bool:
        """Whether ranks have shares of the work; the same on every rank, also where one of them has all of it."""
        return self.grad_scale != 1.0

    def with_work(self, shard: Shard | None) -> LocalWeight:
        if shard is None or self.group is None:
            return self
        if self.work_error and self.requires_grad:
            raise ValueError(self.work_error)
        return dataclasses.replace(self, shard=shard, grad_scale=float(self.group.size()))

    @property
    def own_share(self) -> Shard | None:
        """The share of the work that this rank alone can do; None where any rank can do any of it."""
        return None

    def values(self) -> Tensor:
        return self.values_in(self.parameter)

    @property
    def must_accumulate(self) -> bool:
        # A new gradient is made of zeros around the shard.
        return self.parameter.grad is not None or not self.shard.is_whole

    def check_gradient(self, name: str) -> None:
        error = self.gradient_error or (self.reason_lost() if self.requires_grad else "")
        if error:
            raise ValueError(f"{name}: {error}")
        super().check_gradient(name)

    def gradient(self) -> Tensor:
        if self.parameter.grad is None and not self.shard.is_whole:
            self.parameter.grad = torch.zeros_like(self.parameter, dtype=self.gradient_dtype)
        return self.shard.of(super().gradient())
