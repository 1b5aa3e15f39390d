"""A bucket's projection as a node of the autograd graph, and what ties replicas together in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..distributed import LocalWeight, ReplicatedWeight


class ProjectionFunction(torch.autograd.Function):
    """Squares, and drifts of anchors that are not full, of a batch that is staged in ``run``; the backward pass runs
    the same program.
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
        # Only the full form's gradient reads the weight again; for the others it is not kept alive.
        ctx.subspaces = operands.for_pull_back() if not operands.full else None
        ctx.save_for_backward(*drifts, *((*weights, *operands.pretrained) if operands.full else ()))
        return squares, *drifts

    @staticmethod
    def backward(ctx: Any, grad_squares: Tensor | None, *grad_drifts: Tensor | None) -> Any:  # type: ignore[override]
        count, saved = ctx.count, ctx.saved_tensors
        if ctx.full:
            operands = ops.Operands(weights=saved[:count], pretrained=saved[count:])
            drifts = [saved[0].new_empty((0, 0), dtype=ops.accumulation_dtype(ctx.dtype))] * count
        else:
            operands, drifts = ctx.subspaces, list(saved)
        wanted = [i for i in range(count) if ctx.needs_input_grad[5 + i]]
        grads: list[Tensor | None] = [None] * count
        if wanted and not (grad_squares is None and all(grad is None for grad in grad_drifts)):
            scales = drifts[0].new_zeros((count,)) if grad_squares is None else 2 * grad_squares
            # Not scales[wanted]: an index by a list is sent to the GPU, which has to be waited for.
            factors = scales if len(wanted) == count else torch.stack([scales[i] for i in wanted])
            chosen = [drifts[i] for i in wanted]
            if not ctx.full:
                chosen, factors = ops.mix_drifts(chosen, [grad_drifts[i] for i in wanted], factors)
            pulled = _pull_back(ctx, wanted, operands.pick(wanted), chosen, factors)
            for i, grad in zip(wanted, pulled, strict=True):
                grads[i] = grad
        return None, None, None, None, None, *grads


def _pull_back(
    ctx: Any, wanted: Sequence[int], operands: ops.Operands, drifts: Sequence[Tensor], factors: Tensor
) -> list[Tensor]:
    if torch.is_grad_enabled():
        # A gradient of the gradient is wanted: the operator has one.
        return ops.pull_back(operands, drifts, factors, ctx.dtype, ctx.backend)
    grads = ops.empty_grads(operands, ctx.dtype)
    with ops.running(ctx.program) as run:
        staged = run.stage_pull_back(ctx.batch, wanted, operands, grads, factors, False, drifts)
        run.send()
        run.pull_back_(staged, factors)
    return grads


class _Together(torch.autograd.Function):
    """Tensors as they are, after an empty one. Their gradients are passed on together and in their order, on every
    rank alike whatever it works on: DeepSpeed ZeRO-2 averages gradients in the order in which they come. With
    ``complete`` none is missing."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, complete: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors] if complete else []
        return tensors[0].new_zeros(0, dtype=dtype), *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, joint: Tensor | None, *grads: Tensor | None) -> Any:  # type: ignore[override]
        found = list(grads)
        for i, (shape, dtype, device) in enumerate(ctx.kinds):
            if found[i] is None and ctx.needs_input_grad[i + 2]:
                # One zero, seen as many.
                found[i] = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return None, None, *found


def gather_replicas(weights: Sequence[LocalWeight]) -> tuple[Tensor, list[Tensor]]:
    """An empty tensor that ties the weights together in the graph, and each one's shard."""
    joint, *shown = _Together.apply(  # type: ignore[no-untyped-call, unused-ignore]
        ops.accumulation_dtype(weights[0].dtype),
        any(isinstance(weight, ReplicatedWeight) and bool(weight.gradient_error) for weight in weights),
        *[weight.parameter for weight in weights],
    )
    return joint, [weight.shard.of(tensor) for weight, tensor in zip(weights, shown, strict=True)]
