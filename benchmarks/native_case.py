"""What the benchmark of the CPU engine runs: one layer's weights, the providers, and the memory each one takes."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from fidelity_contract import Agreement, Form
from torch import Tensor

import rpsft_kernels as rk
from rpsft_kernels.pieces import base_copy, computed_block, padded

RELATIVE_DRIFT = 1e-2
_WEIGHT_SCALE = 0.02
# A wide and a tall weight: enough to load libraries and start threads before memory is measured.
_TINY = ((256, 384), (384, 256))


class Layer:
    """Weights with gradients, as they are after some training, and orthonormal bases of their shapes.

    The bases are random: what the penalty costs and how it rounds does not depend on which subspaces they span, and a
    singular value decomposition of every weight would take longer than the benchmark.

    Args:
        shapes: (m, n) of each weight.
        rank: k. A weight whose shorter side is at most k is anchored whole (the full form), as the package does it.
        dtype: of weights and gradients.
        seed: of everything random.
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)

        def normal(rows: int, cols: int) -> Tensor:
            return torch.randn((rows, cols), generator=random)

        self.ranks = [min(rank, m, n) for m, n in shapes]
        self.is_full = [rank >= min(shape) for shape in shapes]
        self.lefts = [torch.linalg.qr(normal(m, k))[0] for (m, _), k in zip(shapes, self.ranks, strict=True)]
        self.rights = [torch.linalg.qr(normal(n, k))[0] for (_, n), k in zip(shapes, self.ranks, strict=True)]
        self.pretrained = [(_WEIGHT_SCALE * normal(m, n)).to(dtype) for m, n in shapes]
        self.weights = []
        for before in self.pretrained:
            noise = normal(*before.shape).mul_(_WEIGHT_SCALE * RELATIVE_DRIFT)
            self.weights.append(noise.add_(before).to(dtype).requires_grad_())
        self._projected: list[Tensor] = []
        self.clear_gradients()

    @property
    def necessary_flops(self) -> int:
        """4mnk + 4k^2 min(m, n) of each weight, the k x k products on the cheaper side; none for a full anchor."""
        return sum(
            0 if full else 4 * weight.numel() * k + 4 * k * k * min(weight.shape)
            for weight, k, full in zip(self.weights, self.ranks, self.is_full, strict=True)
        )

    def clear_gradients(self) -> None:
        for weight in self.weights:
            # fill_ and not zeros: every page of an existing gradient is resident.
            weight.grad = torch.empty_like(weight).fill_(0)

    def worst_gradient_error(self, whole: bool) -> float:
        """The largest relative error of a single weight's ``.grad`` against float64 with unrounded bases.

        Args:
            whole: Whether a full anchor stands for the whole drift, as in this package, or for what U and V span of it:
                of a weight's longer side that is not everything.
        """
        if not self._projected:
            for drift, left, right in zip(self._drifts(), self.lefts, self.rights, strict=True):
                u, v = left.double(), right.double()
                self._projected.append(2 * u @ (u.T @ drift @ v) @ v.T)
        errors = []
        for i, drift in enumerate(self._drifts()):
            gradient = self.weights[i].grad
            assert gradient is not None
            exact = 2 * drift if whole and self.is_full[i] else self._projected[i]
            errors.append(Agreement.of(gradient, exact).relative_error)
        return max(errors)

    def _drifts(self) -> Iterator[Tensor]:
        for weight, before in zip(self.weights, self.pretrained, strict=True):
            yield weight.detach().double() - before.double()


Step = Callable[[], object]
Provider = Callable[[Layer], Step]


def _anchor(layer: Layer, index: int, form: Form) -> rk.Anchor:
    before = layer.pretrained[index]
    shape = (before.shape[0], before.shape[1])
    if layer.is_full[index]:
        return rk.Anchor(
            base=base_copy(before), shape=shape, weight_dtype=before.dtype, rank=layer.ranks[index], energy=1.0
        )
    # Padded before the block is computed: it must cancel to the last bit, so it comes from the very same bases.
    left, right = (padded(basis[index].bfloat16()) for basis in (layer.lefts, layer.rights))
    block, arithmetic = computed_block(before, left, right) if form == "block" else (None, None)
    return rk.Anchor(
        left=left,
        right=right,
        base=base_copy(before) if form == "base" else None,
        block=block,
        shape=shape,
        weight_dtype=before.dtype,
        rank=layer.ranks[index],
        energy=1.0,
        arithmetic=arithmetic,
    )


def _ours(layer: Layer, backend: str, form: Form) -> Step:
    with rk.use_backend(backend):
        anchors = [_anchor(layer, i, form) for i in range(len(layer.weights))]

    def step() -> object:
        with rk.use_backend(backend):
            return rk.accumulate_rotation_grad_(layer.weights, anchors, 1.0)

    return step


def _published(layer: Layer, dtype: torch.dtype) -> Step:
    """``||U^T W V - B||_F^2`` in ``dtype``, weight by weight, as fidelity_case.py writes it; autograd does the rest."""
    pieces = []
    for before, left, right in zip(layer.pretrained, layer.lefts, layer.rights, strict=True):
        # Projected in float32 and rounded once: float16 products would take minutes here, and are not what is timed.
        pieces.append([piece.to(dtype) for piece in (left, right, left.T @ before.float() @ right)])

    def step() -> object:
        terms = []
        for weight, (left, right, block) in zip(layer.weights, pieces, strict=True):
            terms.append((left.T @ weight.to(dtype) @ right - block).square().sum().float())
        loss = torch.stack(terms).sum()
        torch.autograd.backward(loss)
        return loss

    return step


def _gemm(layer: Layer) -> Step:
    """The four products of each weight by ``torch.mm`` alone, in the weights' dtype and into buffers that exist.

    No W0 is subtracted, nothing is squared or added to a gradient: what remains is the machine's rate for the products.
    """
    products: list[tuple[Tensor, Tensor, Tensor]] = []
    for weight, left, right, full in zip(layer.weights, layer.lefts, layer.rights, layer.is_full, strict=True):
        if full:
            continue
        w = weight.detach()
        u, v = left.to(w.dtype).contiguous(), right.to(w.dtype).contiguous()
        (m, n), k = w.shape, u.shape[1]
        c, g = w.new_zeros((k, k)), w.new_zeros((m, n))
        # As in the engine, the k x k products lie on the shorter side.
        if m <= n:
            t, p = w.new_zeros((m, k)), w.new_zeros((m, k))
            products += [(w, v, t), (u.T, t, c), (u, c, p), (p, v.T, g)]
        else:
            t, p = w.new_zeros((k, n)), w.new_zeros((n, k))
            products += [(u.T, w, t), (t, v, c), (v, c.T, p), (u, p.T, g)]

    def step() -> object:
        for first, second, out in products:
            torch.mm(first, second, out=out)
        return None

    return step


def ours_name(backend: str, form: Form) -> str:
    return f"`{backend}`, {form} form"


GEMM = "torch.mm"
FP16 = "published, fp16"
PUBLISHED: Mapping[str, Provider] = {
    FP16: partial(_published, dtype=torch.float16),
    "published, bf16": partial(_published, dtype=torch.bfloat16),
    "published, fp32": partial(_published, dtype=torch.float32),
}


def ours(backend: str) -> dict[str, Provider]:
    """This package's providers, the one that all others are compared with first."""
    pairs: list[tuple[str, Form]] = [(backend, "base"), (backend, "block"), ("torch", "base")]
    return {ours_name(name, form): partial(_ours, backend=name, form=form) for name, form in pairs}


def providers(backend: str) -> dict[str, Provider]:
    return {**ours(backend), GEMM: _gemm, **PUBLISHED}


def _status(field: str) -> int:
    """Bytes of one field of /proc/self/status."""
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status: got no {field}, expected Linux")
    return int(found[1]) * 1024


def extra_bytes(
    name: str, backend: str, shapes: Sequence[tuple[int, int]], rank: int, dtype: torch.dtype, threads: int
) -> int:
    """What one step holds at its peak beyond weights, anchors and existing gradients; for a process of its own.

    Pages of libraries that the step touches first are not counted.
    """
    torch.set_num_threads(threads)
    provider = providers(backend)[name]
    provider(Layer(_TINY, 64, dtype, seed=1))()
    step = provider(Layer(shapes, rank, dtype, seed=0))
    gc.collect()
    # What building the layer freed would otherwise serve the step without showing.
    ctypes.CDLL(None).malloc_trim(0)
    resident, mapped = _status("VmRSS"), _status("RssFile")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    step()
    return max(0, _status("VmHWM") - resident - (_status("RssFile") - mapped))
