"""``project_drift`` and ``pull_back`` as torch operators, with fake tensors, autograd and ``torch.compile``.

Operators take flat lists of tensors, one for each field of :class:`Operands`, because their schemas know no records.
Only this module knows both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..private_names import is_batch
from .dispatch import Backend, load
from .operands import Operands
from .reference import accumulation_dtype
from .selftest.gate import ensure


def without_autocast(device: torch.device) -> Any:
    """Return a context in which products keep their dtypes."""
    # Autocast would reach the products inside an operator and round what must stay float32. Leaving it where it is off
    # would only take time.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def make_ready(backend: str, device: torch.device) -> Backend:
    """Return the backend, after the kernels that it would launch on ``device`` have passed their self-test once.

    Raises:
        RuntimeError: the GPU's kernels have failed it, or they were never tested and a CUDA graph is being captured.
    """
    if backend == "triton" and device.type == "cuda":
        ensure(device)
    return load(backend)


# -- bodies of the operators -----------------------------------------------------------------------------


def _run_project_drift(*flat: Any) -> tuple[list[Tensor], Tensor]:
    *fields, backend = flat
    operands = Operands(*fields)
    device = operands.weights[0].device
    with without_autocast(device):
        return make_ready(backend, device).project_drift(operands)


def _fake_project_drift(*flat: Any) -> tuple[list[Tensor], Tensor]:
    *fields, _backend = flat
    operands = Operands(*fields)
    first, count = operands.weights[0], len(operands.weights)
    ranks = [0] * count if operands.full else [left.shape[1] for left in operands.lefts]
    dtype = accumulation_dtype(first.dtype)
    drifts = [w.new_empty((k, k), dtype=dtype) for w, k in zip(operands.weights, ranks, strict=True)]
    return drifts, first.new_empty((count,), dtype=dtype)


def _run_pull_back(*flat: Any) -> list[Tensor]:
    *fields, drifts, scales, dtype, backend = flat
    operands = Operands(*fields)
    grads = empty_grads(operands, dtype)
    _pull_back_into(grads, operands, drifts, scales, False, backend)
    return grads


def _fake_pull_back(*flat: Any) -> list[Tensor]:
    *fields, _drifts, _scales, dtype, _backend = flat
    return empty_grads(Operands(*fields), dtype)


def _run_pull_back_(grads: list[Tensor], *flat: Any) -> None:
    *fields, drifts, scales, accumulate, backend = flat
    _pull_back_into(grads, Operands(*fields), drifts, scales, accumulate, backend)
    # Autograd must see that the values of a tensor which it may have saved are others now.
    torch.autograd.graph.increment_version(grads)


def _fake_pull_back_(*flat: Any) -> None:
    return None


def _pull_back_into(
    grads: Sequence[Tensor],
    operands: Operands,
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    if grads:
        # Not the device of the scales, which may lie on the CPU.
        device = grads[0].device
        with without_autocast(device):
            make_ready(backend, device).pull_back_into(grads, operands, drifts, scales, accumulate=accumulate)


def empty_grads(operands: Operands, dtype: torch.dtype) -> list[Tensor]:
    """Allocate gradients (m, n) for :func:`pull_back_`, unset."""
    if operands.full:
        return [w.new_empty((w.shape[0], w.shape[1]), dtype=dtype) for w in operands.weights]
    pairs = zip(operands.lefts, operands.rights, strict=True)
    return [u.new_empty((u.shape[0], v.shape[0]), dtype=dtype) for u, v in pairs]


# torch.library.custom_op is not used: its wrappers take longer than the products of a small layer.
_library: Any = torch.library.Library("rpsft_kernels", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]


def _register(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Schemas are written out because older torch versions infer others from annotations.
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rpsft_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.rpsft_kernels, name).default


_ANCHORS = "Tensor[] weights, Tensor[] lefts, Tensor[] rights, Tensor[] pretrained"
_project_drift = _register(
    "project_drift",
    f"({_ANCHORS}, Tensor[] blocks, str backend) -> (Tensor[], Tensor)",
    _run_project_drift,
    _fake_project_drift,
)
_pull_back = _register(
    "pull_back",
    f"({_ANCHORS}, Tensor[] drifts, Tensor scales, ScalarType dtype, str backend) -> Tensor[]",
    _run_pull_back,
    _fake_pull_back,
)
_pull_back_ = _register(
    "pull_back_",
    f"(Tensor(a0!)[] grads, {_ANCHORS}, Tensor[] drifts, Tensor scales, bool accumulate, str backend) -> ()",
    _run_pull_back_,
    _fake_pull_back_,
)


def _leading_lists(operands: Operands) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Return the lists that begin every schema: W, U, V and W0."""
    return list(operands.weights), list(operands.lefts), list(operands.rights), list(operands.pretrained)


# -- autograd: each operation is the other's adjoint -----------------------------------------------------


def _save(ctx: Any, *lists: Sequence[Tensor]) -> None:
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def _restore(ctx: Any) -> list[list[Tensor]]:
    """Return the lists that :func:`_save` was given."""
    tensors = iter(ctx.saved_tensors)
    return [[next(tensors) for _ in range(count)] for count in ctx.counts]


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    *fields, backend = inputs
    operands = Operands(*fields)
    ctx.set_materialize_grads(False)
    ctx.sizes = [len(field) for field in operands]
    ctx.dtype, ctx.backend = operands.weights[0].dtype, backend
    # Only the full form's gradient reads the weight again; the other forms do not keep it alive.
    _save(ctx, output[0], *operands.for_pull_back())


def differentiate_projection(
    needed: Sequence[bool],
    grad_drifts: Sequence[Tensor | None],
    grad_squares: Tensor | None,
    restore: Callable[[], tuple[Operands, list[Tensor]]],
    pull: Callable[[list[int], Operands, list[Tensor], Tensor], Sequence[Tensor]],
) -> list[Tensor | None]:
    """Turn gradients of a projection's outputs into gradients of its N weights.

    Both ways to project differentiate here: the operator, and the programs of a plan.

    Args:
        needed: for each weight, whether it needs a gradient.
        grad_drifts: gradients of the drifts; not read for full anchors, whose drifts are empty.
        grad_squares: (N,), the gradient of the squared norms.
        restore: returns the operands for ``pull_back`` and the drifts of all N weights. It is called only if there is
            a gradient to compute, so that saved tensors are read only then.
        pull: pulls some of the weights back, given their places, operands, drifts and scales.

    Returns:
        N gradients, None for those that are not needed or zero.

    Raises:
        ValueError: gradients come in batches (``is_grads_batched=True``).
    """
    grads: list[Tensor | None] = [None] * len(needed)
    wanted = [i for i, need in enumerate(needed) if need]
    given = [grad for grad in (*grad_drifts, grad_squares) if grad is not None]
    if not wanted or not given:
        return grads
    if any(map(is_batch, given)):
        raise ValueError(
            "grad_outputs: got a batch of gradients for one backward pass, expected one: make a backward pass for each "
            "(without is_grads_batched=True, vectorize=True or torch.func.vmap)"
        )
    operands, drifts = restore()
    scales = drifts[0].new_zeros((len(drifts),)) if grad_squares is None else 2 * grad_squares
    if len(wanted) < len(drifts):
        operands, drifts = operands.pick(wanted), [drifts[i] for i in wanted]
        # scales[wanted] would send the list to the GPU as an index, and wait for it.
        scales = torch.stack([scales[i] for i in wanted])
    if not operands.full:
        drifts, scales = _mix_drifts(drifts, [grad_drifts[i] for i in wanted], scales)
    for i, grad in zip(wanted, pull(wanted, operands, drifts, scales), strict=True):
        grads[i] = grad
    return grads


def _mix_drifts(
    drifts: list[Tensor], grad_drifts: Sequence[Tensor | None], scales: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Combine the gradients of both outputs into one gradient of C, as drifts and scales for ``pull_back``."""
    if all(g is None for g in grad_drifts):
        return drifts, scales
    mixed = [
        c * s if g is None else torch.addcmul(g, c, s)
        for c, s, g in zip(drifts, scales.unbind(), grad_drifts, strict=True)
    ]
    return mixed, torch.ones_like(scales)


def _backward_of_projection(
    ctx: Any, grad_drifts: Sequence[Tensor | None], grad_squares: Tensor | None
) -> tuple[Any, ...]:
    def restore() -> tuple[Operands, list[Tensor]]:
        drifts, *fields = _restore(ctx)
        return Operands(*fields), drifts

    def pull(_: list[int], operands: Operands, drifts: list[Tensor], scales: Tensor) -> list[Tensor]:
        return pull_back(operands, drifts, scales, ctx.dtype, ctx.backend)

    grads = differentiate_projection(ctx.needs_input_grad[0], grad_drifts, grad_squares, restore, pull)
    # The backend's name has no gradient, and the anchors' tensors are constants.
    return (grads, *([None] * size for size in ctx.sizes[1:]), None)


def _save_pull(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    *fields, drifts, scales, _dtype, backend = inputs
    ctx.backend = backend
    _save(ctx, *fields, drifts, [scales])


def _backward_of_pull(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    *fields, drifts, (scales,) = _restore(ctx)
    operands = Operands(*fields)
    factors = scales.unbind()
    to_weights, to_lefts, to_rights, to_pretrained = ([None] * len(field) for field in fields)
    if operands.full:
        to_drifts = [torch.zeros_like(c) for c in drifts]
        differences = [
            w.to(scales.dtype) - b.to(w.dtype).to(scales.dtype)
            for w, b in zip(operands.weights, operands.pretrained, strict=True)
        ]
        to_scales = torch.stack([(g * d).sum() for g, d in zip(grads, differences, strict=True)])
        pulled = [(g * f).to(w.dtype) for g, f, w in zip(grads, factors, operands.weights, strict=True)]
        return pulled, to_lefts, to_rights, to_pretrained, to_drifts, _cast_like(to_scales, scales), None, None
    projected, _ = _project_drift(list(grads), operands.lefts, operands.rights, [], [], ctx.backend)
    to_drifts = [p.to(c.dtype) * f for p, c, f in zip(projected, drifts, factors, strict=True)]
    to_scales = torch.stack([(p * c).sum() for p, c in zip(projected, drifts, strict=True)])
    return to_weights, to_lefts, to_rights, to_pretrained, to_drifts, _cast_like(to_scales, scales), None, None


def _cast_like(values: Tensor, scales: Tensor) -> Tensor:
    return values.to(scales.device, scales.dtype)


torch.library.register_autograd(
    "rpsft_kernels::project_drift", _backward_of_projection, setup_context=_save_projection, lib=_library
)
torch.library.register_autograd("rpsft_kernels::pull_back", _backward_of_pull, setup_context=_save_pull, lib=_library)


# -- the typed entries ------------------------------------------------------------------------------------


def project_drift(operands: Operands, backend: str) -> tuple[list[Tensor], Tensor]:
    """Project many weights of one form, dtype and device to their drifts: ``C = U^T (W - W0) V`` (arXiv 2605.10973).

    Args:
        operands: N weights with the tensors of their anchors (:class:`Operands`); differentiable in the weights.
        backend: the backend's name, from :func:`resolve_backend`.

    Returns:
        The N drifts (k, k), float32 (float64 for float64 weights), (0, 0) for full anchors; and (N,) their
        squared Frobenius norms, ``||W - W0||_F^2`` for full anchors.
    """
    drifts, squares = _project_drift(*_leading_lists(operands), list(operands.blocks), backend)
    return list(drifts), squares


def pull_back(
    operands: Operands, drifts: Sequence[Tensor], scales: Tensor, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """Apply the adjoint of :func:`project_drift`: ``scale * U C V^T``, or ``scale * (W - W0)`` for full anchors.

    Args:
        operands: U and V of N weights, or W and W0 for full anchors (:meth:`Operands.for_pull_back`).
        drifts: N tensors (k, k), float32 (float64 for float64 weights).
        scales: (N,), the dtype of the drifts, on the weights' device or on the CPU. Those on the CPU travel with the
            table that the backend sends to a GPU in any case, and are not waited for.
        dtype: the dtype of the gradients.
        backend: the backend's name.

    Returns:
        N new tensors (m, n) of ``dtype``.
    """
    return list(_pull_back(*_leading_lists(operands), list(drifts), scales, dtype, backend))


def pull_back_(
    grads: Sequence[Tensor],
    operands: Operands,
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    """Like :func:`pull_back`, but add to existing gradients (m, n) of one dtype, or write over them.

    The sum is formed in float32 and rounded once to the gradient's dtype.
    """
    _pull_back_(list(grads), *_leading_lists(operands), list(drifts), scales, accumulate, backend)
