"""Providers of the penalty and its gradient: this package, the published formula, plain PyTorch.

A provider is called with a layer, prepares the tensors of an anchor, and returns the step that is timed: it adds
``dR/dW`` of every weight to the gradients that exist and returns R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

import rpsft_kernels as rk
from benchmarks.fidelity.contract import MAX_ERROR, AnchorForm
from benchmarks.reporting.results import Role
from benchmarks.suites.layer import Layer
from rpsft_kernels import ops
from rpsft_kernels.anchors.tensors import compute_block
from rpsft_kernels.distributed.shard import Shard

# R as a scalar tensor; None where the step computes none.
Step = Callable[[], Tensor | None]

GEMM = "torch.mm"
PLAIN = "plain torch, base form"
FP16 = "published, fp16"
BF16 = "published, bf16"
FP32 = "published, fp32"
COMPILED = "published, bf16, torch.compile"
# Best first.
_BACKENDS = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}
_PUBLISHED = {FP16: torch.float16, BF16: torch.bfloat16, FP32: torch.float32}


@dataclass(frozen=True)
class Provider:
    """One way to add the penalty's gradient.

    Attributes:
        name: as tables show it.
        prepare: makes the step for a layer.
        bound: bound of a single weight's relative gradient error; None records the error without judging it.
        has_gradient: False for products alone, in which nothing can be wrong.
        reads_base: whether W0 itself is read where there are U and V.
        why_not: the reason why it cannot run on this machine; empty where it can.
        products: dtype of its matrix products where a CPU may be extremely slow in it; None where it is not.
        compiled: whether its first run compiles.
    """

    name: str
    role: Role
    prepare: Callable[[Layer], Step]
    bound: float | None = None
    has_gradient: bool = True
    reads_base: bool = False
    why_not: str = ""
    products: torch.dtype | None = None
    compiled: bool = False

    def __call__(self, layer: Layer) -> Step:
        return self.prepare(layer)


# -- this package ------------------------------------------------------------------------------------------


def anchor_of(layer: Layer, index: int, form: AnchorForm) -> rk.Anchor:
    """Make the anchor of one of the layer's weights, by the backend in force; it shares the layer's U, V and W0."""
    before, shape = layer.pretrained[index], layer.shapes[index]
    rank, dtype = layer.ranks[index], before.dtype
    if layer.is_full[index]:
        base = layer.bf16_pretrained[index]
        return rk.Anchor(base=base, shape=shape, weight_dtype=dtype, rank=rank, energy=1.0)
    left, right = layer.subspaces[index]
    # The block is computed from the very U and V that the step reads, so that it cancels to the last bit.
    block, arithmetic = compute_block(before, left, right, Shard.whole(shape)) if form == "block" else (None, None)
    return rk.Anchor(
        left=left,
        right=right,
        base=layer.bf16_pretrained[index] if form == "base" else None,
        block=block,
        shape=shape,
        weight_dtype=dtype,
        rank=rank,
        energy=1.0,
        arithmetic=arithmetic,
    )


def _prepare_accumulation(layer: Layer, backend: str, form: AnchorForm) -> Step:
    with rk.use_backend(backend):
        anchors = [anchor_of(layer, i, form) for i in range(len(layer.weights))]

    def step() -> Tensor:
        with rk.use_backend(backend):
            return rk.accumulate_rotation_grad_(layer.weights, anchors, 1.0)

    return step


def _prepare_autograd(layer: Layer, backend: str, form: AnchorForm) -> Step:
    with rk.use_backend(backend):
        anchors = [anchor_of(layer, i, form) for i in range(len(layer.weights))]

    def step() -> Tensor:
        with rk.use_backend(backend):
            penalty = rk.rotation_penalty(layer.weights, anchors)
            torch.autograd.backward(penalty)
            return penalty.detach()

    return step


def ours_name(backend: str, form: AnchorForm, autograd: bool = False) -> str:
    return f"{backend}, {form} form" + (", autograd" if autograd else "")


def ours(device: torch.device, dtype: torch.dtype) -> list[Provider]:
    """List this package's providers for the device, best first; with the reason where one cannot run."""
    listed = []
    for backend in _BACKENDS[device.type]:
        why_not = ops.available_backends(device, dtype)[backend] or ""
        forms: tuple[AnchorForm, ...] = ("base", "block")
        for form in forms:
            for autograd, call in ((False, _prepare_accumulation), (True, _prepare_autograd)):
                listed.append(
                    Provider(
                        ours_name(backend, form, autograd),
                        "ours",
                        partial(call, backend=backend, form=form),
                        MAX_ERROR[form],
                        reads_base=form == "base",
                        why_not=why_not,
                    )
                )
    return listed


# -- plain PyTorch, as a user could write ---------------------------------------------------------------------------


def _plain(layer: Layer) -> Step:
    """Prepare the base form by ``torch.mm``, weight by weight: no autograd, the gradient added by ``addmm_``.

    The drift is rounded to bfloat16 before it is multiplied, and the k x k products lie on the shorter side. A float32
    gradient has its bfloat16 product added to it: ``addmm_`` takes one dtype.
    """
    held = list(zip(layer.weights, layer.bf16_pretrained, layer.subspaces, layer.is_full, strict=True))

    @torch.no_grad()
    def step() -> Tensor:
        terms = []
        for weight, before, (left, right), full in held:
            gradient = weight.grad
            assert gradient is not None
            drift = torch.sub(weight, before).bfloat16()
            if full:
                terms.append(drift.float().square().sum())
                gradient.add_(drift, alpha=2.0)
                continue
            if weight.shape[0] <= weight.shape[1]:
                core = left.T @ (drift @ right)
                factors = left @ core, right.T
            else:
                core = (left.T @ drift) @ right
                factors = left, core @ right.T
            terms.append(core.float().square().sum())
            if gradient.dtype == torch.bfloat16:
                gradient.addmm_(*factors, alpha=2.0)
            else:
                gradient.add_(factors[0] @ factors[1], alpha=2.0)
        return torch.stack(terms).sum()

    return step


# -- the published formula -------------------------------------------------------------------------------------


def _term(weight: Tensor, left: Tensor, right: Tensor, block: Tensor) -> Tensor:
    return (left.T @ weight.to(left.dtype) @ right - block).square().sum().float()


def _full_term(weight: Tensor, before: Tensor) -> Tensor:
    return (weight.to(before.dtype) - before).square().sum().float()


def _published(layer: Layer, dtype: torch.dtype, compiled: bool = False) -> Step:
    """Prepare ``||U^T W V - B||_F^2`` with everything in ``dtype``, weight by weight; autograd does the rest.

    Written from the mathematics of arXiv 2605.10973, not from its authors' code. Weights whose shorter side is at most
    k have ``||W - W0||_F^2`` instead.
    """
    pieces: list[Sequence[Tensor]] = []
    for before, left, right, full in zip(layer.pretrained, layer.lefts, layer.rights, layer.is_full, strict=True):
        # B is projected in float32 and rounded once: float16 products take minutes on a CPU, and are not timed here.
        whole = [before] if full else [left, right, left.T @ before.float() @ right]
        pieces.append([piece.to(dtype) for piece in whole])
    term, full_term = _term, _full_term
    if compiled:
        # Otherwise the functions of earlier cases would count towards the limit of recompilations.
        torch.compiler.reset()
        term, full_term = (torch.compile(function, dynamic=False) for function in (_term, _full_term))

    def step() -> Tensor:
        terms = []
        for weight, held, full in zip(layer.weights, pieces, layer.is_full, strict=True):
            terms.append(full_term(weight, *held) if full else term(weight, *held))
        loss = torch.stack(terms).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    return step


@lru_cache
def _no_compiler(device: torch.device) -> str:
    """Say why ``torch.compile`` does not work here; empty where it does. A small function is compiled to find out."""
    try:
        doubled = torch.compile(lambda x: 2 * x + 1, dynamic=False)(torch.ones(8, device=device))
        return "" if bool((doubled == 3).all()) else "torch.compile gives wrong results here"
    # A missing or broken compiler may raise anything, and the benchmark goes on without it.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"torch.compile does not work here: {lines[0][:200]}"


# -- the machine's rate ------------------------------------------------------------------------------------------


def _gemm(layer: Layer) -> Step:
    """Prepare the four products of each weight by ``torch.mm`` alone, in bfloat16 and into buffers that exist.

    No W0 is subtracted, nothing is squared or added to a gradient: the step shows the machine's rate for the products.
    """
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, weight in enumerate(layer.weights):
        if layer.is_full[i]:
            continue
        # The necessary products are in bfloat16 for every dtype of the weight.
        w = weight.detach().bfloat16()
        u, v = layer.subspaces[i]
        (m, n), k = w.shape, u.shape[1]
        c, g = w.new_zeros((k, k)), w.new_zeros((m, n))
        # As in the kernels, the k x k products lie on the shorter side.
        if m <= n:
            t, p = w.new_zeros((m, k)), w.new_zeros((m, k))
            products += [(w, v, t), (u.T, t, c), (u, c, p), (p, v.T, g)]
        else:
            t, p = w.new_zeros((k, n)), w.new_zeros((n, k))
            products += [(u.T, w, t), (t, v, c), (v, c.T, p), (u, p.T, g)]

    def step() -> None:
        for first, second, out in products:
            torch.mm(first, second, out=out)

    return step


def providers(device: torch.device, dtype: torch.dtype, compiling: bool = True) -> list[Provider]:
    """List all providers in the order of the tables: ours first, and the most important of these at the top.

    Args:
        device: the device that the steps run on.
        dtype: dtype of weights and gradients.
        compiling: False leaves out providers that compile, with that as the reason.
    """
    no_compiler = _no_compiler(device) if compiling else "left out of this case: compiling takes long"
    published = [
        Provider(name, "published", partial(_published, dtype=computed), products=computed)
        for name, computed in _PUBLISHED.items()
    ]
    compiled = partial(_published, dtype=torch.bfloat16, compiled=True)
    return [
        *ours(device, dtype),
        # The same arithmetic as the base form with one more rounding, of C.
        Provider(PLAIN, "plain", _plain, 2 * MAX_ERROR["base"], reads_base=True),
        Provider(GEMM, "gemm", _gemm, has_gradient=False),
        *published,
        Provider(COMPILED, "published", compiled, why_not=no_compiler, compiled=True),
    ]
