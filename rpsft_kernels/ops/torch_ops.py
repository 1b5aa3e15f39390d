"""``project_drift`` and ``pull_back`` as torch operators: fake tensors, autograd, ``torch.compile``.

Lists hold one entry per weight; an empty list stands for a piece that the anchor's form has not:

========== ============== ============== ============ ==================
form       lefts, rights  bases          blocks       drift
========== ============== ============== ============ ==================
base       U, V           W0             --           U^T (W - W0) V
block      U, V           --             B            U^T W V - B
bare       U, V           --             --           U^T W V
full       --             W0             --           (0, 0): W - W0 itself
========== ============== ============== ============ ==================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .dispatch import Backend, load
from .reference import accumulation_dtype
from .selftest.gate import ensure


def _without_autocast(device: torch.device) -> Any:
    # Autocast would reach the products inside an operator and round what must stay float32. Leaving it where it is off
    # would only take time.
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def make_ready(backend: str, device: torch.device) -> Backend:
    """The backend, once what it would launch on ``device`` has passed its self-test: at once but for the first time.

    Raises:
        RuntimeError: the GPU's kernels have failed it, or they were never tested and a CUDA graph is being captured.
    """
    if backend == "triton" and device.type == "cuda":
        ensure(device)
    return load(backend)


def _run_project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    with _without_autocast(weights[0].device):
        return make_ready(backend, weights[0].device).project_drift(weights, lefts, rights, bases, blocks)


def _fake_project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    ranks = [left.shape[1] for left in lefts] if lefts else [0] * len(weights)
    dtype = accumulation_dtype(weights[0].dtype)
    drifts = [w.new_empty((k, k), dtype=dtype) for w, k in zip(weights, ranks, strict=True)]
    return drifts, weights[0].new_empty((len(weights),), dtype=dtype)


def _into(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    if grads:
        # The device of the gradients: the scales may lie on the CPU.
        with _without_autocast(grads[0].device):
            ready = make_ready(backend, grads[0].device)
            ready.pull_back_into(grads, weights, lefts, rights, bases, drifts, scales, accumulate=accumulate)


def _run_pull_back(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    grads = _empty_grads(weights, lefts, rights, dtype)
    _into(grads, weights, lefts, rights, bases, drifts, scales, False, backend)
    return grads


def _fake_pull_back(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    return _empty_grads(weights, lefts, rights, dtype)


def _empty_grads(
    weights: Sequence[Tensor], lefts: Sequence[Tensor], rights: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    if lefts:
        return [u.new_empty((u.shape[0], v.shape[0]), dtype=dtype) for u, v in zip(lefts, rights, strict=True)]
    return [w.new_empty((w.shape[0], w.shape[1]), dtype=dtype) for w in weights]


def _run_pull_back_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    _into(grads, weights, lefts, rights, bases, drifts, scales, accumulate, backend)
    # Autograd must see that a tensor which it has saved is another one now.
    torch.autograd.graph.increment_version(grads)


def _fake_pull_back_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    return None


# Not torch.library.custom_op: its wrappers take longer than the products of a small layer.
_library: Any = torch.library.Library("rpsft_kernels", "FRAGMENT")  # type: ignore[no-untyped-call, unused-ignore]


def _registered(name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    # Written out: what older torch versions infer from annotations differs.
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rpsft_kernels::{name}", fake, lib=_library)
    return getattr(torch.ops.rpsft_kernels, name).default


_ANCHORS = "Tensor[] weights, Tensor[] lefts, Tensor[] rights, Tensor[] bases"
_project_drift = _registered(
    "project_drift",
    f"({_ANCHORS}, Tensor[] blocks, str backend) -> (Tensor[], Tensor)",
    _run_project_drift,
    _fake_project_drift,
)
_pull_back = _registered(
    "pull_back",
    f"({_ANCHORS}, Tensor[] drifts, Tensor scales, ScalarType dtype, str backend) -> Tensor[]",
    _run_pull_back,
    _fake_pull_back,
)
_pull_back_ = _registered(
    "pull_back_",
    f"(Tensor(a0!)[] grads, {_ANCHORS}, Tensor[] drifts, Tensor scales, bool accumulate, str backend) -> ()",
    _run_pull_back_,
    _fake_pull_back_,
)


# -- autograd: each operation is the other's adjoint -----------------------------------------------------


def _save_projection(ctx: Any, inputs: tuple[Any, ...], output: tuple[list[Tensor], Tensor]) -> None:
    weights, lefts, rights, bases, blocks, backend = inputs
    ctx.set_materialize_grads(False)
    # Only the full form's gradient reads the weight again; for the others it is not kept alive.
    kept = [] if lefts else [*weights, *bases]
    ctx.counts = (len(weights), len(lefts), len(bases), len(blocks))
    ctx.dtype, ctx.backend = weights[0].dtype, backend
    ctx.save_for_backward(*lefts, *rights, *output[0], *kept)


def _drift_gradient(
    drifts: list[Tensor], grad_drifts: Sequence[Tensor | None], scales: Tensor
) -> tuple[list[Tensor], Tensor]:
    """d/dC of the two outputs together, as drifts and scales for ``pull_back``."""
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
    n, n_bases, n_blocks = ctx.counts[0], ctx.counts[2], ctx.counts[3]
    wanted = [i for i, needed in enumerate(ctx.needs_input_grad[0]) if needed]
    saved = list(ctx.saved_tensors)
    lefts, rights = (saved[:n], saved[n : 2 * n]) if ctx.counts[1] else ([], [])
    drifts = saved[len(lefts) + len(rights) :][:n]
    kept = saved[len(lefts) + len(rights) + n :]
    weights, bases = kept[:n], kept[n:]
    nothing = ([None] * len(lefts), [None] * len(rights), [None] * n_bases, [None] * n_blocks, None)
    if not wanted or (grad_squares is None and all(g is None for g in grad_drifts)):
        return ([None] * n, *nothing)
    scales = drifts[0].new_zeros((n,)) if grad_squares is None else 2 * grad_squares

    def pick(pieces: list[Any]) -> list[Any]:
        return [pieces[i] for i in wanted] if pieces else []

    # Not scales[wanted]: an index by a list is sent to the GPU, which has to be waited for.
    chosen, factors = pick(drifts), scales if len(wanted) == n else torch.stack([scales[i] for i in wanted])
    if lefts:
        chosen, factors = _drift_gradient(chosen, pick(list(grad_drifts)), factors)
    pulled = _pull_back(pick(weights), pick(lefts), pick(rights), pick(bases), chosen, factors, ctx.dtype, ctx.backend)
    grads: list[Tensor | None] = [None] * n
    for i, grad in zip(wanted, pulled, strict=True):
        grads[i] = grad
    return (grads, *nothing)


def _save_pull(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    weights, lefts, rights, bases, drifts, scales, _dtype, backend = inputs
    ctx.counts = (len(weights), len(lefts), len(bases), len(drifts))
    ctx.backend = backend
    ctx.save_for_backward(*weights, *lefts, *rights, *bases, *drifts, scales)


def _backward_of_pull(ctx: Any, grads: Sequence[Tensor]) -> tuple[Any, ...]:
    n_weights, n_lefts, n_bases, n_drifts = ctx.counts
    saved = iter(ctx.saved_tensors)
    weights, lefts, rights, bases, drifts = (
        [next(saved) for _ in range(count)] for count in (n_weights, n_lefts, n_lefts, n_bases, n_drifts)
    )
    scales = next(saved)
    factors = scales.unbind()
    if lefts:
        seen, _ = _project_drift(list(grads), lefts, rights, [], [], ctx.backend)
        to_drifts = [s.to(c.dtype) * f for s, c, f in zip(seen, drifts, factors, strict=True)]
        to_scales = torch.stack([(s * c).sum() for s, c in zip(seen, drifts, strict=True)])
        to_weights = [None] * n_weights
    else:
        to_drifts = [torch.zeros_like(c) for c in drifts]
        moved = [w.to(scales.dtype) - b.to(w.dtype).to(scales.dtype) for w, b in zip(weights, bases, strict=True)]
        to_scales = torch.stack([(g * d).sum() for g, d in zip(grads, moved, strict=True)])
        to_weights = [(g * f).to(w.dtype) for g, f, w in zip(grads, factors, weights, strict=True)]
    none = [None] * n_lefts
    return to_weights, none, none, [None] * n_bases, to_drifts, to_scales.to(scales.device, scales.dtype), None, None


torch.library.register_autograd(
    "rpsft_kernels::project_drift", _backward_of_projection, setup_context=_save_projection, lib=_library
)
torch.library.register_autograd("rpsft_kernels::pull_back", _backward_of_pull, setup_context=_save_pull, lib=_library)


# -- the typed entries ------------------------------------------------------------------------------------


def project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
    backend: str,
) -> tuple[list[Tensor], Tensor]:
    """Drifts of many weights of one form, dtype and device: ``C = U^T (W - W0) V`` (arXiv 2605.10973).

    Args:
        weights: N tensors (m, n), one dtype, any strides; differentiable.
        lefts: N bases U (m, k), or [] for full anchors.
        rights: N bases V (n, k), or [] for full anchors.
        bases: N pretrained weights W0 (m, n), or [].
        blocks: N pretrained projections B (k, k) in float32, or [].
        backend: the backend's name, from :func:`resolve_backend`.

    Returns:
        The N drifts (k, k), float32 (float64 for float64 weights), (0, 0) for full anchors; and (N,) their
        squared Frobenius norms, ``||W - W0||_F^2`` for full anchors.
    """
    drifts, squares = _project_drift(list(weights), list(lefts), list(rights), list(bases), list(blocks), backend)
    return list(drifts), squares


def pull_back(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    dtype: torch.dtype,
    backend: str,
) -> list[Tensor]:
    """The adjoint of :func:`project_drift`: ``scale * U C V^T``, or ``scale * (W - W0)`` for full anchors.

    Args:
        weights: N tensors (m, n) for full anchors, else [].
        lefts: N bases U (m, k), or [] for full anchors.
        rights: N bases V (n, k), or [] for full anchors.
        bases: N pretrained weights (m, n) for full anchors, else [].
        drifts: N tensors (k, k), float32 (float64 for float64 weights).
        scales: (N,), the dtype of the drifts, on the weights' device or on the CPU. Those of the CPU travel with what
            the backend sends to a GPU in any case, and are not waited for.
        dtype: of the gradients.
        backend: the backend's name.

    Returns:
        N new tensors (m, n) of ``dtype``.
    """
    return list(_pull_back(list(weights), list(lefts), list(rights), list(bases), list(drifts), scales, dtype, backend))


def pull_back_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
    backend: str,
) -> None:
    """:func:`pull_back` into existing gradients (m, n) of one dtype: added, or written over what is there.

    The sum is formed in float32 and rounded once to the gradient's dtype.
    """
    _pull_back_(
        list(grads), list(weights), list(lefts), list(rights), list(bases), list(drifts), scales, accumulate, backend
    )
