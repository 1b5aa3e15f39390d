"""The rotation penalty and its gradient, for tensors, lists of tensors and whole modules."""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .anchor import Anchor
from .names import named_weights
from .weights import check_weight

# Anchors whose foreign block has been reported: once per anchor, not once per step.
_reported: weakref.WeakSet[Anchor] = weakref.WeakSet()


@dataclass(frozen=True)
class _Pair:
    """One weight with its anchor, under the name that messages give it."""

    name: str
    weight: Tensor
    anchor: Anchor


def _paired(weights: object, anchors: object) -> list[_Pair]:
    """Every accepted way to say which weights and which anchors, checked and as one list."""
    if isinstance(weights, nn.Module):
        return _paired_by_name(weights, anchors)
    if isinstance(weights, Tensor):
        if not isinstance(anchors, Anchor):
            raise ValueError(f"anchors: got {type(anchors).__name__}, expected one Anchor for one weight tensor")
        pairs = [_Pair("weights", weights, anchors)]
    elif isinstance(weights, Sequence):
        if not isinstance(anchors, Sequence):
            raise ValueError(
                f"anchors: got {type(anchors).__name__}, expected a list of as many Anchors as there are weights"
            )
        if len(weights) != len(anchors):
            raise ValueError(f"anchors: got {len(anchors)} for {len(weights)} weights, expected one Anchor per weight")
        for i, anchor in enumerate(anchors):
            if not isinstance(anchor, Anchor):
                raise ValueError(f"anchors[{i}]: got {type(anchor).__name__}, expected an Anchor")
        pairs = [_Pair(f"weights[{i}]", w, a) for i, (w, a) in enumerate(zip(weights, anchors, strict=True))]
    else:
        raise ValueError(
            f"weights: got {type(weights).__name__}, expected a tensor, a list of tensors or a torch.nn.Module"
        )
    for pair in pairs:
        _check_pair(pair)
    return pairs


def _paired_by_name(model: nn.Module, anchors: object) -> list[_Pair]:
    if not isinstance(anchors, Mapping):
        raise ValueError(
            f"anchors: got {type(anchors).__name__}, expected Anchors for a module "
            "(Anchors.from_model(model, rank) makes them)"
        )
    if not anchors:
        raise ValueError(
            "anchors: got none, expected at least one Anchor: nothing would be regularised "
            "(Anchors.from_model(model, rank) makes them)"
        )
    parameters = named_weights(model)
    for name, anchor in anchors.items():
        if not isinstance(anchor, Anchor):
            raise ValueError(f"anchors[{name!r}]: got {type(anchor).__name__}, expected an Anchor")
    gone = [name for name in anchors if name not in parameters]
    if gone:
        shown = ", ".join(map(repr, gone[:5])) + (", ..." if len(gone) > 5 else "")
        raise ValueError(
            f"model: {len(gone)} of {len(anchors)} anchored parameters are gone: {shown}; expected a parameter of each "
            "anchor's name: anchor this model (Anchors.from_model), or leave them out of the anchors"
        )
    pairs = [_Pair(name, parameters[name], anchor) for name, anchor in anchors.items()]
    for pair in pairs:
        _check_pair(pair)
    return pairs


def _check_pair(pair: _Pair) -> None:
    weight, anchor = pair.weight, pair.anchor
    check_weight(weight, pair.name)
    if tuple(weight.shape) != tuple(anchor.shape):
        raise ValueError(
            f"{pair.name}: got shape {tuple(weight.shape)}, expected {tuple(anchor.shape)}: the weight has changed "
            "its shape since it was anchored; anchor it again"
        )
    if anchor.weight_dtype == torch.float64 != weight.dtype:
        # Its pieces are in float64, which no kernel reads.
        raise ValueError(
            f"{pair.name}: got {str(weight.dtype).removeprefix('torch.')}, expected float64 like the weight that was "
            "anchored; anchor it again in the dtype that is trained"
        )
    if weight.device != anchor.device:
        raise ValueError(
            f"{pair.name}: got a weight on {weight.device} and its anchor on {anchor.device}, expected one device; "
            f"move the anchor: anchors.to({str(weight.device)!r})"
        )


@dataclass(frozen=True)
class _Bucket:
    """Weights of one form, dtype and device: the arguments of the two operations."""

    pairs: list[_Pair]
    backend: str

    @property
    def weights(self) -> list[Tensor]:
        return [p.weight for p in self.pairs]

    @property
    def lefts(self) -> list[Tensor]:
        return [p.anchor.left for p in self.pairs if p.anchor.left is not None]

    @property
    def rights(self) -> list[Tensor]:
        return [p.anchor.right for p in self.pairs if p.anchor.right is not None]

    @property
    def bases(self) -> list[Tensor]:
        return [p.anchor.base for p in self.pairs if p.anchor.base is not None]

    @property
    def blocks(self) -> list[Tensor]:
        return [p.anchor.block for p in self.pairs if p.anchor.block is not None]

    def project(self) -> tuple[list[Tensor], Tensor]:
        return ops.project_drift(self.weights, self.lefts, self.rights, self.bases, self.blocks, self.backend)


def _gradient_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the gradient that a leaf has, or is to get."""
    if weight.grad is not None:
        return weight.grad.dtype
    dtype: torch.dtype | None = getattr(weight, "grad_dtype", None)
    return weight.dtype if dtype is None else dtype


def _specification(pair: _Pair, into_gradients: bool) -> ops.WeightSpec:
    anchor, weight = pair.anchor, pair.weight
    left = anchor.left
    key = (
        weight.device,
        weight.dtype,
        None if anchor.base is None else anchor.base.dtype,
        None if left is None else left.dtype,
        anchor.block is not None,
        _gradient_dtype(weight) if into_gradients and weight.requires_grad else None,
    )
    if left is None:
        return ops.WeightSpec(weight.shape[0], weight.shape[1], 0, key)
    parts = 1 if anchor.block is None and left.dtype == torch.bfloat16 else 3
    return ops.WeightSpec(weight.shape[0], weight.shape[1], anchor.rank, key, parts)


# On the CPU nothing is gained by many weights in one call but the calls' own cost, which matters at small ranks.
_CPU_LIMITS = ops.BucketLimits(drift_bytes=1 << 20, one_orientation=False)


def _buckets(pairs: list[_Pair], into_gradients: bool = False) -> list[_Bucket]:
    buckets = []
    limits = _CPU_LIMITS if all(pair.weight.device.type == "cpu" for pair in pairs) else None
    for indices in ops.plan_buckets([_specification(pair, into_gradients) for pair in pairs], limits):
        members = [pairs[i] for i in indices]
        weight = members[0].weight
        backend = ops.resolve_backend(weight.device, weight.dtype)
        if members[0].anchor.block is not None and not torch.compiler.is_compiling():
            _report_foreign_blocks(members, ops.arithmetic_id(backend, weight.device, weight.dtype))
        buckets.append(_Bucket(members, backend))
    return buckets


def _report_foreign_blocks(pairs: list[_Pair], arithmetic: str) -> None:
    for pair in pairs:
        block = pair.anchor.block
        if block is None or pair.anchor.arithmetic == arithmetic or pair.anchor in _reported:
            continue
        _reported.add(pair.anchor)
        residual = (torch.finfo(torch.float32).eps * block.norm().item()) ** 2
        warnings.warn(
            f"{pair.name}: the anchor's block was computed by {pair.anchor.arithmetic!r} and is used by "
            f"{arithmetic!r}, which rounds differently: at the pretrained weight its penalty is not exactly 0 but of "
            f"the order of {residual:.1e}. Rebuild it from the pretrained weight: Anchors.load(path, model) or "
            "Anchor.rebuilt_block(weight); or keep the base",
            UserWarning,
            stacklevel=4,
        )


def rotation_penalty(
    weights: Tensor | Sequence[Tensor] | nn.Module, anchors: Anchor | Sequence[Anchor] | Mapping[str, Anchor]
) -> Tensor:
    """The rotation penalty ``R = sum ||U^T (W - W0) V||_F^2`` of arXiv 2605.10973, differentiable in W.

    Args:
        weights: one weight (m, n), a list of weights, or a module whose parameters are found by the anchors'
            names. bfloat16, float16, float32 or float64; any strides.
        anchors: one :class:`Anchor`, a list of as many, or :class:`Anchors`, each on its weight's device.

    Returns:
        A scalar in float32 (float64 where a weight is float64), on the first weight's device. Full
        anchors contribute ``||W - W0||_F^2``. Frozen weights count towards R; they get no gradient. A sum over
        an empty list is 0.0, on the CPU.

    Raises:
        ValueError: a weight is no dense 2-D floating tensor, has another shape or device than its anchor, was
            anchored in float64 and is not float64 now, an anchored parameter is gone from the module, there is no
            anchor at all for a module, or the requested backend cannot serve the device or dtype.

    Multiply R by the paper's lambda: ``(task_loss + coeff * R).backward()``. The gradient ``2 U C V^T`` (full:
    ``2 (W - W0)``) is computed in ``backward`` one bucket of weights at a time: where R has a backward pass of its
    own (``(coeff * R).backward()``), no more than one bucket's gradients exist beside the ``.grad`` they are added to.
    In one pass with the task loss, autograd sums the two before it touches ``.grad``: gradients that exist already
    (of earlier micro-batches) then have a second set beside them, as large as the anchored weights.
    :func:`accumulate_rotation_grad_` needs neither.
    """
    pairs = _paired(weights, anchors)
    if not pairs:
        return torch.zeros(())
    return _total([bucket.project()[1] for bucket in _buckets(pairs)], pairs[0].weight.device)


def _total(squares: list[Tensor], device: torch.device) -> Tensor:
    # One concatenation and one sum, in the buckets' fixed order.
    return torch.cat([s.to(device) for s in squares]).sum()


def accumulate_rotation_grad_(
    weights: Tensor | Sequence[Tensor] | nn.Module,
    anchors: Anchor | Sequence[Anchor] | Mapping[str, Anchor],
    coeff: float,
) -> Tensor:
    """Add ``coeff * dR/dW`` to every weight's ``.grad`` without autograd; returns R (not multiplied by coeff).

    Call it once per optimizer step, after the last ``backward`` of its micro-batches (and after
    ``GradScaler.unscale_``, where a scaler is used) and before gradient clipping and ``optimizer.step()``.

    Args:
        weights: as for :func:`rotation_penalty`; tensors must be leaves that require grad.
        anchors: as for :func:`rotation_penalty`.
        coeff: the paper's lambda, a finite number.

    Returns:
        R as :func:`rotation_penalty` gives it, detached.

    Raises:
        ValueError: as :func:`rotation_penalty`; also where coeff is not finite, a tensor is not a leaf
            that requires grad, every anchored weight of a module is frozen, or a gradient is sparse. No
            gradient has changed then.

    The product is added inside the kernel, summed in float32 and rounded once to the gradient's own dtype; no tensor as
    large as a weight is allocated, except a ``.grad`` that did not exist yet. Frozen weights of a module
    count towards R and get no gradient.
    """
    if isinstance(coeff, bool) or not isinstance(coeff, (int, float)) or not abs(coeff) <= sys.float_info.max:
        raise ValueError(f"coeff: got {coeff!r}, expected a finite Python number (the paper's lambda)")
    pairs = _paired(weights, anchors)
    if not pairs:
        return torch.zeros(())
    _check_gradients(pairs, whole_module=isinstance(weights, nn.Module))
    with torch.no_grad():
        squares = []
        for bucket in _buckets(pairs, into_gradients=True):
            drifts, square = bucket.project()
            _accumulate(bucket, drifts, float(coeff))
            squares.append(square)
        return _total(squares, pairs[0].weight.device)


def _check_gradients(pairs: list[_Pair], whole_module: bool) -> None:
    for pair in pairs:
        weight = pair.weight
        if not whole_module and not (weight.requires_grad and weight.is_leaf):
            raise ValueError(
                f"{pair.name}: got a tensor that is no leaf requiring grad, expected one that holds .grad; "
                "call weight.requires_grad_(), or use rotation_penalty"
            )
        if weight.grad is not None and weight.grad.layout != torch.strided:
            raise ValueError(
                f"{pair.name}.grad: got layout {weight.grad.layout}, expected a dense gradient "
                "(torch.nn.Embedding(sparse=False)); or leave this weight out of the anchors"
            )
    if not any(pair.weight.requires_grad for pair in pairs):
        raise ValueError(
            "model: every anchored parameter is frozen, expected at least one that requires grad; "
            "use rotation_penalty to evaluate the penalty alone"
        )


def _accumulate(bucket: _Bucket, drifts: list[Tensor], coeff: float) -> None:
    """Pull a bucket's drifts back into the gradients: added where one exists, written where it is new."""
    left = [i for i, pair in enumerate(bucket.pairs) if pair.weight.requires_grad]
    while left:
        # A weight that is listed twice has one gradient, which no launch may write twice.
        first = {id(bucket.pairs[i].weight): i for i in reversed(left)}
        members = [i for i in left if first[id(bucket.pairs[i].weight)] == i]
        left = [i for i in left if i not in members]
        new = [i for i in members if bucket.pairs[i].weight.grad is None]
        old = [i for i in members if bucket.pairs[i].weight.grad is not None]
        _pull(bucket, new, drifts, coeff, accumulate=False)
        _pull(bucket, old, drifts, coeff, accumulate=True)


def _pull(bucket: _Bucket, members: list[int], drifts: list[Tensor], coeff: float, accumulate: bool) -> None:
    if not members:
        return
    part = _Bucket([bucket.pairs[i] for i in members], bucket.backend)
    grads = []
    for weight in part.weights:
        if weight.grad is None:
            weight.grad = torch.empty_like(weight, dtype=_gradient_dtype(weight))
        grads.append(weight.grad)
    chosen = [drifts[i] for i in members]
    scales = chosen[0].new_full((len(members),), 2.0 * coeff)
    full = not part.lefts
    weights, bases = (part.weights, part.bases) if full else ([], [])
    ops.pull_back_(grads, weights, part.lefts, part.rights, bases, chosen, scales, accumulate, part.backend)


def project(weight: Tensor, left: Tensor, right: Tensor, base: Tensor | None = None) -> Tensor:
    """The drift ``C = U^T (W - base) V`` of arXiv 2605.10973, differentiable in ``weight`` alone.

    Args:
        weight: W (m, n), bfloat16, float16, float32 or float64, any strides.
        left: U (m, k). Bases in bfloat16 are used as they are, others in float32 (float64 with a float64 weight).
        right: V (n, k).
        base: W0 (m, n), subtracted in float32 before anything is rounded; None projects W itself.

    Returns:
        C (k, k) in float32 (float64 for a float64 weight).

    Raises:
        ValueError: no dense 2-D floating tensor, shapes or devices that disagree, or left, right or base
            require grad.
    """
    check_weight(weight, "weight")
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
    bases = []
    if base is not None:
        bases.append(base.to(weight.dtype) if base.dtype == torch.float64 else base)
    drifts, _ = ops.project_drift([weight], [left.to(dtype)], [right.to(dtype)], bases, [], backend)
    return drifts[0]
