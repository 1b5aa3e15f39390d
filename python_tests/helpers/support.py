"""Random problems in every layout and form, and the formulas in float64."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from rpsft_kernels.ops import Operands

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FORMS: tuple[Form, ...] = ("base", "block", "bare", "full")
LAYOUTS: tuple[Layout, ...] = ("contiguous", "transposed", "padded", "sliced")

Form = Literal["base", "block", "bare", "full"]
Layout = Literal["contiguous", "transposed", "padded", "sliced"]


class Pieces(Protocol):
    """The fields of an anchor that the formulas read; ``rk.Anchor`` has them, and so has :class:`Problem`."""

    @property
    def left(self) -> Tensor | None: ...
    @property
    def right(self) -> Tensor | None: ...
    @property
    def base(self) -> Tensor | None: ...
    @property
    def block(self) -> Tensor | None: ...


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight W (m, n) and the pieces that its form has: U (m, k), V (n, k), W0 (m, n), B (k, k)."""

    weight: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    base: Tensor | None = None
    block: Tensor | None = None


# -- random matrices -----------------------------------------------------------------------------------------


def laid_out(matrix: Tensor, layout: Layout) -> Tensor:
    """A view with the values of ``matrix`` (m, n) that lies in memory as ``layout`` says; what surrounds it is NaN.

    ``transposed``: columns are contiguous. ``padded``: rows are, with a stride of n rounded up to 16 elements, plus 16.
    ``sliced``: every second column of a matrix twice as wide, so that no dimension is contiguous.
    """
    rows, cols = matrix.shape
    if layout == "contiguous":
        return matrix.clone(memory_format=torch.contiguous_format)
    if layout == "transposed":
        return matrix.T.clone(memory_format=torch.contiguous_format).T
    if layout == "padded":
        frame = matrix.new_full((rows, -(-cols // 16) * 16 + 16), float("nan"))
        view = frame[:, :cols]
    else:
        frame = matrix.new_full((rows, 2 * cols), float("nan"))
        view = frame[:, ::2]
    view.copy_(matrix)
    return view


def random_matrix(
    rows: int,
    cols: int,
    dtype: torch.dtype = torch.float32,
    *,
    scale: float = 1.0,
    seed: int = 0,
    layout: Layout = "contiguous",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Normal numbers times ``scale``: the same for one seed on every device."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + 1009 * rows + cols)
    values = torch.randn(rows, cols, generator=generator, dtype=torch.float64) * scale
    return laid_out(values.to(dtype).to(device), layout)


def orthonormal(
    rows: int,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """A basis (rows, rank), orthonormal in float64 before it is rounded to ``dtype``."""
    columns = torch.linalg.qr(random_matrix(rows, rank, torch.float64, seed=seed)).Q
    return columns.to(dtype).contiguous().to(device)


def make_problem(
    form: Form,
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype = torch.float32,
    *,
    basis_dtype: torch.dtype = torch.bfloat16,
    base_dtype: torch.dtype | None = None,
    drift: float = 0.05,
    layout: Layout = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Problem:
    """A weight that has moved by ``drift`` (relative, in every direction) from its pretrained value.

    ``base_dtype``: of W0, by default the weight's; the pretrained weight is exact in it. W, and W0 where the form has
    it, lie as ``layout`` says. With ``drift=0`` the weight is what a model of ``dtype`` holds of W0, and a
    block is the float64 projection of that, rounded.
    """
    m, n = shape
    held = dtype if base_dtype is None else base_dtype
    pretrained = random_matrix(m, n, held, scale=0.2, seed=seed, device=device)
    step = random_matrix(m, n, torch.float64, scale=0.2 * drift, seed=seed + 1, device=device)
    weight = laid_out((pretrained.to(dtype).double() + step).to(dtype), layout)
    base = laid_out(pretrained, layout) if form in ("base", "full") else None
    if form == "full":
        return Problem(weight, base=base)
    left = orthonormal(m, rank, basis_dtype, seed=seed + 2, device=device)
    right = orthonormal(n, rank, basis_dtype, seed=seed + 3, device=device)
    block = None
    if form == "block":
        exact = left.double().T @ pretrained.to(dtype).double() @ right.double()
        block = exact.to(accumulation(dtype))
    return Problem(weight, left, right, base, block)


def operands_of(problems: Iterable[Problem]) -> Operands:
    """Return the operands of the problems."""
    problems = list(problems)

    def present(name: str) -> list[Tensor]:
        pieces: Sequence[Tensor | None] = [getattr(problem, name) for problem in problems]
        return [piece for piece in pieces if piece is not None]

    return Operands(present("weight"), present("left"), present("right"), present("base"), present("block"))


# -- the formulas in float64 ---------------------------------------------------------------------------------


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def exact_moved(weight: Tensor, base: Tensor | None) -> Tensor:
    """W - W0 (or W), W0 being what a model of the weight's dtype holds of the base."""
    moved = weight.double()
    return moved if base is None else moved - base.to(weight.dtype).double()


def exact_drift(weight: Tensor, pieces: Pieces) -> Tensor:
    """``C = U^T (W - W0) V``, ``U^T W V - B`` or ``U^T W V``; W - W0 itself where there are no bases."""
    drift = exact_moved(weight, pieces.base)
    if pieces.left is not None and pieces.right is not None:
        drift = pieces.left.double().T @ drift @ pieces.right.double()
    return drift if pieces.block is None else drift - pieces.block.double()


def exact_penalty(weight: Tensor, pieces: Pieces) -> Tensor:
    return exact_drift(weight, pieces).square().sum()


def exact_gradient(weight: Tensor, pieces: Pieces, scale: float = 2.0) -> Tensor:
    """``scale * U C V^T`` (``scale=2``: dR/dW); ``scale * (W - W0)`` where there are no bases."""
    drift = exact_drift(weight, pieces)
    if pieces.left is None or pieces.right is None:
        return scale * drift
    return exact_pull(drift, pieces.left, pieces.right, scale)


def exact_pull(drift: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * U C V^T``."""
    return scale * (left.double() @ drift.double() @ right.double().T)


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact``; the plain norm where ``exact`` is 0."""
    difference, size = float((actual.double() - exact).norm()), float(exact.norm())
    return difference / size if size else difference


def cosine(actual: Tensor, exact: Tensor) -> float:
    actual = actual.double()
    return float((actual * exact).sum() / (actual.norm() * exact.norm()))
