"""Problems that fill a GPU, made and checked on it: what small shapes cannot show shows there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rpsft_kernels import ops
from support import Form, Layout, laid_out

# Both orientations, more tiles than any GPU has multiprocessors, and edges that no tile divides.
SHAPES = ((4096, 4096), (1032, 4104), (4104, 1032), (14336, 4096), (4096, 14328))


@dataclass(frozen=True)
class Case:
    """Weights of one form, dtype and layout. ``basis``, ``base`` and ``grad``: dtypes of U and V, W0 and G."""

    form: Form = "base"
    dtype: torch.dtype = torch.bfloat16
    layout: Layout = "contiguous"
    rank: int = 768
    basis: torch.dtype = torch.bfloat16
    base: torch.dtype | None = None
    grad: torch.dtype | None = None

    def __str__(self) -> str:
        names = [self.form, *(str(t)[6:] for t in (self.dtype, self.basis, self.base, self.grad) if t is not None)]
        return f"{' '.join(names)} {self.layout} {self.rank}"


@dataclass(frozen=True, eq=False)
class Inputs:
    """Lists as the operations take them, and gradients G that are there already."""

    weights: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    bases: list[Tensor]
    blocks: list[Tensor]
    grads: list[Tensor]
    scales: Tensor
    before: list[Tensor] = field(default_factory=list)

    def operands(self) -> ops.Operands:
        return ops.Operands(self.weights, self.lefts, self.rights, self.bases, self.blocks)


def make_inputs(
    case: Case, shapes: Sequence[tuple[int, int]], device: torch.device, drift: float = 0.05, seed: int = 0
) -> Inputs:
    """Random weights that have moved by ``drift`` (relative); with 0 they are what a model holds of their W0."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, cols: int, scale: float) -> Tensor:
        return torch.empty(rows, cols, device=device).normal_(0, scale, generator=generator)

    inputs = Inputs([], [], [], [], [], [], torch.linspace(0.5, 2.0, len(shapes), device=device))
    for m, n in shapes:
        held = normal(m, n, 0.02).to(case.base or case.dtype)
        pretrained = held.to(case.dtype)
        weight = (pretrained.float() + normal(m, n, 0.02 * drift)).to(case.dtype) if drift else pretrained
        inputs.weights.append(laid_out(weight, case.layout))
        if case.form in ("base", "full"):
            inputs.bases.append(laid_out(held, case.layout))
        if case.form != "full":
            for bases, size in ((inputs.lefts, m), (inputs.rights, n)):
                bases.append(torch.linalg.qr(normal(size, case.rank, 1.0)).Q.contiguous().to(case.basis))
        if case.form == "block":
            # Anchors make the block of the weight in the same layout.
            lies = [laid_out(pretrained, case.layout)]
            (block,), _ = ops.project_drift(ops.Operands(lies, inputs.lefts[-1:], inputs.rights[-1:]), "triton")
            inputs.blocks.append(block)
        grad = normal(m, n, 0.01).to(case.grad or case.dtype)
        inputs.before.append(grad)
        inputs.grads.append(laid_out(grad, case.layout))
    return inputs


def step(inputs: Inputs) -> tuple[list[Tensor], Tensor]:
    """C and ``||C||^2`` of every weight; ``scale * dR/dW / 2`` is added to the gradients as they were before."""
    operands = inputs.operands()
    drifts, squares = ops.project_drift(operands, "triton")
    for grad, before in zip(inputs.grads, inputs.before, strict=True):
        grad.copy_(before)
    ops.pull_back_(inputs.grads, operands.for_pull_back(), drifts, inputs.scales, True, "triton")
    return drifts, squares


def findings(case: Case, inputs: Inputs, drifts: Sequence[Tensor], squares: Tensor) -> Iterator[str]:
    """The results of a step that differ from those of float64 for the same inputs."""
    for i, weight in enumerate(inputs.weights):
        base = inputs.bases[i].to(case.dtype) if inputs.bases else None
        moved = weight.double() if base is None else weight.double() - base.double()
        if case.form == "full":
            exact, pulled = moved, float(inputs.scales[i]) * moved
        else:
            left, right = inputs.lefts[i].double(), inputs.rights[i].double()
            whole = left.T @ moved @ right
            exact = whole - inputs.blocks[i].double() if inputs.blocks else whole
            error = float((drifts[i].double() - exact).norm())
            # W - W0 and T are rounded to bfloat16, by 2^-9 each at most; where they are not, sums are float32.
            rounded = case.form == "base" and case.basis == torch.bfloat16
            allowed = 2.0**-8 * float(exact.norm()) if rounded else 1e-4 * float(whole.norm())
            if not error <= allowed:
                yield f"C of weight {i}: error {error:.2e}, allowed {allowed:.2e}"
            pulled = float(inputs.scales[i]) * (left @ drifts[i].double() @ right.T)
        square = float(drifts[i].double().square().sum() if case.form != "full" else exact.square().sum())
        if not abs(float(squares[i]) - square) <= 1e-5 * square:
            yield f"square of weight {i}: {float(squares[i])}, exactly {square}"
        expected = inputs.before[i].double() + pulled
        error = float((inputs.grads[i].double() - expected).norm())
        # C and P are rounded to bfloat16 too, and the sum once to the gradient's dtype.
        product = {"full": 1e-6}.get(case.form, 2.0**-8 if case.basis == torch.bfloat16 else 2e-5)
        allowed = product * float(pulled.norm()) + torch.finfo(inputs.grads[i].dtype).eps * float(expected.norm())
        if not error <= allowed:
            yield f"gradient of weight {i}: error {error:.2e}, allowed {allowed:.2e}"
