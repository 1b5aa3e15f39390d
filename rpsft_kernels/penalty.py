"""The rotation penalty and its gradient, for tensors, lists of tensors and whole modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import SupportsFloat

import torch
from torch import Tensor, nn

from . import ops
from .anchors.anchor import Anchor
from .checks import check_weight
from .evaluation.call import Call, open_call
from .evaluation.forward_mode import check_tangent
from .evaluation.requests import AccumulationRequest, PenaltyRequest
from .evaluation.transforms import check_transform


def rotation_penalty(
    weights: Tensor | Sequence[Tensor] | nn.Module, anchors: Anchor | Sequence[Anchor] | Mapping[str, Anchor]
) -> Tensor:
    """The rotation penalty ``R = sum ||U^T (W - W0) V||_F^2`` of arXiv 2605.10973, differentiable in W.

    Args:
        weights: one weight (m, n), a list of weights, or a module, whose parameters are looked up by the anchors'
            names. bfloat16, float16, float32 or float64; any strides.
        anchors: one :class:`Anchor`, a list of as many, or :class:`Anchors`, each on its weight's device.

    Returns:
        A scalar in float32 (float64 where a weight is float64), on the first weight's device. Full
        anchors contribute ``||W - W0||_F^2``. Frozen weights count towards R; they get no gradient. A sum over
        an empty list is 0.0, on the CPU.

    Raises:
        ValueError: a weight is not a dense 2-D floating tensor, has another shape or device than its anchor, was
            anchored in float64 and is not float64 now, or has a tangent of forward-mode differentiation; an anchored
            parameter is gone from the module, there is no anchor at all for a module, or the requested backend cannot
            serve the device or dtype. For sharded weights also: a rank's weights are not finite, anchors differ between
            ranks or belong to other shards than this process holds, or flat shards (FSDP1, ZeRO-3) would need a
            gradient.
        RuntimeError: a rank of the process group is gone; the message names it where that is known.

    If weights lie over several processes, every rank makes this call, and R is the same number on each. Shards are
    found in DTensors (FSDP2, tensor parallel; lists of tensors too), and, given a module, under DistributedDataParallel
    and DeepSpeed ZeRO-1/2, whose weights are divided over ranks by cost: R's gradient on a rank is then that of its own
    share, times the number of ranks, and exact once gradients are averaged. No weight is gathered; the C of a bucket
    are summed by one all-reduce (:mod:`rpsft_kernels.distributed.group_call` documents the order), and a rank that
    fails, or makes another call, makes every rank raise. With FSDP2 on a GPU compute R after the model's forward pass,
    not before it: its gradients then come before those that FSDP2 adds on another stream.

    In one process a weight that is not finite makes R not finite, and its own gradient; no call waits to refuse that.
    Over several processes, which wait for each other anyway, every rank refuses it (one rank's NaN would reach all).

    The first call with new anchors measures how far each weight is from W0, and warns (UserWarning) of weights that are
    other ones (farther than half of ||W0||), and of such as differ from W0 by the rounding to another dtype alone. What
    ``torch.compile`` traces measures nothing: make one call outside of it, such as a first one under ``no_grad``.

    Multiply R by the paper's lambda: ``(task_loss + coeff * R).backward()``. The gradient ``2 U C V^T`` (full:
    ``2 (W - W0)``) is computed in ``backward`` one bucket of weights at a time: if R has a backward pass of its own
    (``(coeff * R).backward()``), no more than one bucket's gradients exist beside the ``.grad`` they are added to. In
    one pass with the task loss, autograd sums the two before it adds to ``.grad``: gradients that exist already (from
    earlier micro-batches) then have a second set beside them, as large as the anchored weights.
    :func:`accumulate_rotation_grad_` needs neither. R has second derivatives, and no forward-mode differentiation.
    Where C is summed over ranks a backward pass with ``create_graph=True`` raises a ValueError: R is quadratic, and its
    Hessian's product with v is R's gradient at W + v less that at W.
    """
    call = open_call(weights, anchors, PenaltyRequest(), Call)
    if call is None:
        return torch.zeros(())
    try:
        return call.penalty()
    finally:
        call.close()


def accumulate_rotation_grad_(
    weights: Tensor | Sequence[Tensor] | nn.Module,
    anchors: Anchor | Sequence[Anchor] | Mapping[str, Anchor],
    coeff: SupportsFloat,
) -> Tensor:
    """Add ``coeff * dR/dW`` to every weight's ``.grad`` without autograd; returns R (not multiplied by coeff).

    Call it once per optimizer step, after the last ``backward`` of its micro-batches (and after
    ``GradScaler.unscale_``, if you use a scaler) and before gradient clipping and ``optimizer.step()``. Weights that
    DistributedDataParallel keeps equal are the exception: for them call it before the last ``backward``, the one that
    averages (earlier micro-batches under ``no_sync()``), because each rank adds its own share times the number of
    ranks.

    Sharded weights (DTensor, FSDP1's flat parameters, DeepSpeed ZeRO-3) are served too: every rank makes the call and
    adds to its own shard of the gradient; see :func:`rotation_penalty`. No rank adds before all sums have arrived.

    Args:
        weights: as for :func:`rotation_penalty`; tensors must be leaves that require grad.
        anchors: as for :func:`rotation_penalty`.
        coeff: the paper's lambda, a finite number: whatever ``float()`` takes but bools and text. 2 coeff has to be a
            float32 (float64 for float64 weights). A tensor on a GPU is waited for.

    Returns:
        R, detached: the same bits as :func:`rotation_penalty` returns for the same weights, anchors, backend and
        machine.

    Raises:
        ValueError: as :func:`rotation_penalty`; also if coeff is no such number, a tensor is not a leaf that requires
            grad, every anchored weight of a module is frozen, a gradient is sparse, averaged over ranks already, in a
            dtype that the backend cannot add to or in the memory of another gradient, or DeepSpeed ZeRO-1/2 keeps it to
            itself. No gradient has changed then.
        RuntimeError: as :func:`rotation_penalty`.

    The product is added inside the kernel, summed in float32 and rounded once to the gradient's own dtype; no tensor as
    large as a weight is allocated, except a ``.grad`` that did not exist yet. (Backend ``torch`` on a GPU: temporaries
    of up to 256 MiB.) Frozen weights of a module count towards R and get no gradient. A ``.grad`` whose elements share
    memory (``torch.autograd.grad`` of a sum is an expanded number) is replaced by a copy, and the tensor itself is left
    as it is.

    In one process a weight that is not finite makes R and that weight's gradient not finite, on the CPU as on a GPU:
    ``clip_grad_norm_(..., error_if_nonfinite=True)`` raises after this call (a GradScaler has looked before it, in
    ``unscale_``). Over several processes every rank raises, and no gradient has changed.

    Nothing here waits for a GPU, but for the first call with new anchors, and the call can be captured in a CUDA graph,
    once the same step has run outside of the capture (that loads kernels and sets pinned memory aside). A replay reads
    the weights and adds to the gradients at their addresses during the capture, with that ``coeff`` and those anchors.
    A ``.grad`` that the capture itself made lies in the graph's memory, and is written, not added to, at each replay.
    The same holds for :func:`rotation_penalty` and its backward pass. Weights over several processes are the exception:
    see :mod:`rpsft_kernels.distributed.group_call`.
    """
    request = AccumulationRequest(coeff, of_module=isinstance(weights, nn.Module))
    with torch.no_grad():
        call = open_call(weights, anchors, request, Call)
        if call is None:
            return torch.zeros(())
        try:
            return call.accumulate_()
        finally:
            call.close()


def project(weight: Tensor, left: Tensor, right: Tensor, base: Tensor | None = None) -> Tensor:
    """Return the drift ``C = U^T (W - base) V`` of arXiv 2605.10973, differentiable in ``weight`` alone.

    Args:
        weight: W (m, n), bfloat16, float16, float32 or float64, any strides.
        left: U (m, k). If U and V are in bfloat16 they are used as they are, else in float32 (float64 with a float64
            weight).
        right: V (n, k).
        base: W0 (m, n), subtracted in float32 before anything is rounded; None projects W itself.

    Returns:
        C (k, k) in float32 (float64 for a float64 weight).

    Raises:
        ValueError: an argument is not a dense 2-D floating tensor, shapes or devices disagree, left, right or base
            require grad, or weight has a tangent of forward-mode differentiation.
    """
    check_weight(weight, "weight")
    check_tangent(weight, "weight")
    check_transform(weight, "weight")
    for name, piece in (("left", left), ("right", right), ("base", base)):
        if piece is None:
            continue
        check_weight(piece, name)
        if piece.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires grad, expected a constant; pass {name}.detach()")
        if piece.device != weight.device:
            raise ValueError(
                f"{name}: got a tensor on {piece.device}, expected the weight's device {weight.device}; "
                f"move it: {name}.to(weight.device)"
            )
    rank = left.shape[1]
    expected = {"left": (weight.shape[0], rank), "right": (weight.shape[1], rank), "base": tuple(weight.shape)}
    for name, piece in (("left", left), ("right", right), ("base", base)):
        if piece is not None and tuple(piece.shape) != expected[name]:
            raise ValueError(
                f"{name}: got shape {tuple(piece.shape)}, expected {expected[name]} for a weight of shape "
                f"{tuple(weight.shape)} (U is (m, k), V is (n, k))"
            )
    if weight.dtype == torch.float64:
        dtype = torch.float64
    else:
        dtype = torch.bfloat16 if left.dtype == right.dtype == torch.bfloat16 else torch.float32
    backend = ops.resolve_backend(weight.device, weight.dtype)
    pretrained = []
    if base is not None:
        pretrained.append(base.to(weight.dtype) if base.dtype == torch.float64 else base)
    operands = ops.Operands([weight], [left.to(dtype)], [right.to(dtype)], pretrained)
    drifts, _ = ops.project_drift(operands, backend)
    return drifts[0]
