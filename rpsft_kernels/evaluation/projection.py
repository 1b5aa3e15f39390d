"""Nodes of the autograd graph: the projection of a bucket, and one that ties replicas together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed import LocalWeight, ReplicatedWeight


class ProjectionFunction(torch.autograd.Function):
    """Projects a batch that is staged in ``run``: returns its squares and, unless the anchors are full, its drifts.

    The backward pass begins a run of its own of the same program.
    """

    @staticmethod
    def forward(
        ctx: Any, program: ops.Program, run: ops.Run, batch: int, backend: str, operands: ops.Operands, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        drifts, squares = run.project(batch), run.squares_of(batch).clone()
        if operands.full:
            drifts = []
        ctx.set_materialize_grads(False)
        ctx.program, ctx.batch, ctx.backend = program, batch, backend
        ctx.dtype, ctx.full, ctx.count = weights[0].dtype, operands.full, len(weights)
        # Only the full form's gradient reads the weight again; the other forms do not keep it alive.
        ctx.subspaces = operands.for_pull_back() if not operands.full else None
        ctx.save_for_backward(*drifts, *((*weights, *operands.pretrained) if operands.full else ()))
        return squares, *drifts

    @staticmethod
    def backward(ctx: Any, grad_squares: Tensor | None, *grad_drifts: Tensor | None) -> Any:  # type: ignore[override]
        needed = ctx.needs_input_grad[-ctx.count :]
        grads = ops.differentiate_projection(
            needed, grad_drifts, grad_squares, partial(_restore, ctx), partial(_pull_back, ctx)
        )
        return None, None, None, None, None, *grads


def _restore(ctx: Any) -> tuple[ops.Operands, list[Tensor]]:
    count, saved = ctx.count, ctx.saved_tensors
    if not ctx.full:
        return ctx.subspaces, list(saved)
    drifts = [saved[0].new_empty((0, 0), dtype=ops.accumulation_dtype(ctx.dtype))] * count
    return ops.Operands(weights=saved[:count], pretrained=saved[count:]), drifts


def _pull_back(
    ctx: Any, wanted: Sequence[int], operands: ops.Operands, drifts: Sequence[Tensor], scales: Tensor
) -> list[Tensor]:
    if torch.is_grad_enabled():
        # The gradient is to be differentiated itself, which only the operator can.
        return ops.pull_back(operands, drifts, scales, ctx.dtype, ctx.backend)
    grads = ops.empty_grads(operands, ctx.dtype)
    with ops.open_run(ctx.program) as run:
        staged = run.stage_pull_back(
            ctx.batch, wanted, operands, grads=grads, scales=scales, accumulate=False, drifts=drifts
        )
        run.send()
        run.pull_back_(staged, scales)
    return grads


class _TieTogether(torch.autograd.Function):
    """Returns an empty tensor, then the given ones as they are.

    Their gradients are passed on together, on every rank alike whichever weights it works on. With ``complete``, zeros
    stand for those that are missing. The first of the tensors may be the empty tensor of another node, whose gradients
    then come after these.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, complete: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors] if complete else []
        return tensors[0].new_zeros(0, dtype=dtype), *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, joint: Tensor | None, *grads: Tensor | None) -> Any:  # type: ignore[override]
        passed = list(grads)
        for i, (shape, dtype, device) in enumerate(ctx.kinds):
            if passed[i] is None and ctx.needs_input_grad[i + 2]:
                # One zero, expanded, takes the memory of one.
                passed[i] = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return None, None, *passed


def gather_replicas(weights: Sequence[LocalWeight]) -> tuple[Tensor, list[Tensor]]:
    """Return each weight's shard, and before them an empty tensor that ties the weights together in the graph.

    DeepSpeed ZeRO-2 averages gradients in the order in which they arrive, which must be every rank's. Of gradients that
    one node passes on at once autograd chooses an order that depends on what else is waiting, and that is another
    on each rank: each gets a node of its own there, one after the other.
    """
    dtype = ops.accumulation_dtype(weights[0].dtype)
    parameters = [weight.parameter for weight in weights]
    if any(isinstance(weight, ReplicatedWeight) and bool(weight.gradient_error) for weight in weights):
        joint, tied = _tie_in_order(dtype, parameters)
    else:
        joint, *tied = _TieTogether.apply(dtype, False, *parameters)  # type: ignore[no-untyped-call, unused-ignore]
    return joint, [weight.values_in(tensor) for weight, tensor in zip(weights, tied, strict=True)]


def _tie_in_order(dtype: torch.dtype, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    joint, tied = parameters[0].new_empty(0, dtype=dtype), []
    for parameter in parameters:
        joint, _, tensor = _TieTogether.apply(dtype, True, joint, parameter)  # type: ignore[no-untyped-call, unused-ignore]
        tied.append(tensor)
    return joint, tied
