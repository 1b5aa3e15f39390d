"""Flat shards: FSDP1's FlatParameter and DeepSpeed ZeRO-3's partitions."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .part import Part
from .weight import LocalWeight


@dataclass(frozen=True)
class FlatParameterWeight(LocalWeight):
    """One of the weights that an FSDP1 FlatParameter concatenates; ``parameter`` is the FlatParameter.

    ``original`` is the module's own parameter where FSDP1 keeps it (``use_orig_params=True``): a view of the shard.
    """

    handle: Any = None
    index: int = 0
    offset: int = 0
    original: nn.Parameter | None = None

    @property
    def identity(self) -> int:
        return hash((id(self.parameter), self.index))

    @property
    def _holder(self) -> Tensor:
        return self.parameter if self.original is None else self.original

    @property
    def requires_grad(self) -> bool:
        return self._holder.requires_grad

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def has_gradient(self) -> bool:
        # What is new in a FlatParameter is zeros: its other weights have no gradient here.
        return self.original is None or self.original.grad is not None

    @property
    def gradient_dtype(self) -> torch.dtype:
        # Not that of the gradient at hand: a rank that holds nothing of a weight has none, and must say the same.
        handle = self.handle
        reduced: torch.dtype | None = handle._fwd_bwd_param_dtype if handle._keep_low_precision_grads else None
        return self.dtype if reduced is None else reduced

    def _slice(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1)[self.offset : self.offset + self.part.numel].view(self.part.local_shape)

    def values(self) -> Tensor:
        flat: Any = self.parameter
        if flat.shape != flat._sharded_size:
            raise ValueError(
                f"weights: got FSDP1 parameters that are gathered now ({', '.join(flat._fqns[:3])}), expected them "
                "sharded: make this call after the backward pass"
            )
        return self._slice(self.parameter.detach())

    def check_gradient(self, name: str) -> None:
        self.values()
        if self.handle._skipped_use_sharded_views:
            # FSDP1 would not see a gradient that is new now.
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
        if self.original is None:
            return self._slice(holder.grad)
        return holder.grad.reshape(self.part.local_shape)


def find_flat_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], LocalWeight]]:
    """(path from the FSDP1 module on, shape of the whole, what of it lies here) of all that FSDP1 flattens.

    Tied weights come once under each of their names.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for path, module in model.named_modules():
        if not isinstance(module, fsdp.FullyShardedDataParallel) or not module._handle:
            continue
        handle: Any = module._handle
        flat = handle.flat_param
        prefix = path + "." if path else ""
        kept = flat._params if handle._use_orig_params else [None] * len(flat._fqns)
        weights = {}
        for index, (name, shape, original) in enumerate(zip(flat._fqns, flat._shapes, kept, strict=True)):
            weights[name] = (tuple(shape), _located(handle, index, tuple(shape), original))
        for shared in flat._shared_param_infos:
            primary = ".".join(filter(None, (shared.prim_module_name, shared.prim_param_name)))
            weights[".".join(filter(None, (shared.module_name, shared.param_name)))] = weights[primary]
        for name, (shape, weight) in weights.items():
            yield prefix + name, shape, weight


def _located(handle: Any, index: int, shape: tuple[int, ...], original: nn.Parameter | None) -> LocalWeight:
    flat, info = handle.flat_param, handle.flat_param._shard_param_infos[index]
    # Of what is no matrix only the shape is ever asked for.
    matrix = (shape[0], shape[1]) if len(shape) == 2 else (1, 1)
    begin, end, offset = 0, 0, 0
    if info.in_shard and len(shape) == 2:
        begin, end, offset = info.intra_param_start_idx, info.intra_param_end_idx + 1, info.offset_in_shard
    if handle.uses_sharded_strategy and handle.process_group.size() > 1:
        part, group = Part.range(matrix, begin, end), handle.process_group
    else:
        part, group = Part.whole(matrix), None
    return FlatParameterWeight(flat, shape, part, group, handle=handle, index=index, offset=offset, original=original)


def is_zero3(parameter: Any) -> bool:
    return hasattr(parameter, "ds_tensor") and hasattr(parameter, "ds_shape")


@dataclass(frozen=True)
class ZeroWeight(LocalWeight):
    """A parameter that DeepSpeed ZeRO-3 has partitioned; its gradient is reached through DeepSpeed's ``safe_*``."""

    @property
    def _deepspeed(self) -> Any:
        return self.parameter

    @property
    def device(self) -> torch.device:
        device: torch.device = self._deepspeed.ds_tensor.device
        return device

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def has_gradient(self) -> bool:
        # Without a gradient in this step's backward passes, the last step's is still in its place.
        reduced = getattr(self._optimizer, "_offload_boundary_param_ids", None)
        return reduced is None or self._deepspeed.ds_id in reduced

    @property
    def gradient_dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def _optimizer(self) -> Any:
        return self._deepspeed._z3_optimizer

    def values(self) -> Tensor:
        values: Tensor = self._deepspeed.ds_tensor.detach()
        return values[: self.part.numel].view(self.part.local_shape)

    def check_gradient(self, name: str) -> None:
        if not self.requires_grad:
            return
        if not hasattr(self.parameter, "_z3_optimizer"):
            raise ValueError(f"{name}: got a parameter without DeepSpeed's optimizer; call deepspeed.initialize first")
        optimizer = self._optimizer
        if optimizer.offload_optimizer:
            # Gradients reach the optimizer's side with the last micro-batch.
            seen = optimizer._epilogue_ran_this_backward or optimizer.micro_step_id > 0
            ready = seen and optimizer.is_gradient_accumulation_boundary()
        else:
            ready = bool(optimizer.averaged_gradients)
        if not ready:
            # DeepSpeed's next backward pass would write over what is added now.
            raise ValueError(
                f"{name}: got a DeepSpeed ZeRO-3 parameter without a gradient for the next step, expected this call "
                "between engine.backward of the last micro-batch and engine.step"
            )

    def gradient(self) -> Tensor:
        from deepspeed.utils import safe_get_local_grad

        gradient: Tensor = safe_get_local_grad(self.parameter)
        return gradient.reshape(-1)[: self.part.numel].view(self.part.local_shape)

    def store(self, gradient: Tensor) -> None:
        from deepspeed.utils import safe_set_local_grad

        # The last ranks' partitions are padded.
        padded = gradient.new_zeros(self._deepspeed.ds_tensor.numel())
        padded[: gradient.numel()] = gradient.reshape(-1)
        safe_set_local_grad(self.parameter, padded)
        reduced = getattr(self._optimizer, "_offload_boundary_param_ids", None)
        if reduced is not None:
            reduced.add(self._deepspeed.ds_id)


def locate_zero3(parameter: Tensor, name: str) -> ZeroWeight:
    """What of a ZeRO-3 parameter lies here: partitions of equal length in the order of ranks."""
    deepspeed: Any = parameter
    shape, group = tuple(deepspeed.ds_shape), deepspeed.ds_process_group
    length, total = deepspeed.ds_tensor.ds_numel, deepspeed.ds_numel
    begin = min(total, length * group.rank())
    if group.size() > 1:
        part = Part.range(shape, begin, min(total, begin + length))  # type: ignore[arg-type]
    else:
        part, group = Part.whole(shape), None  # type: ignore[arg-type]
    optimizer = getattr(parameter, "_z3_optimizer", None)
    # In float16 DeepSpeed keeps gradients multiplied by its loss scale until the step.
    factor = float(getattr(optimizer, "loss_scale", 1.0))
    return ZeroWeight(parameter, shape, part, group, factor)
