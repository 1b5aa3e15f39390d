"""The numbers that backends are tested with: random ones, and ones whose results no order of summation changes.

Nothing here touches torch's own random state, its default dtype or device.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operands import Operands
from .cases import Case, Shape

_NAN = float("nan")
# Rows of a held basis are a multiple of so many elements long.
_ROW_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class Problem:
    """One weight (m, n) with the pieces that its form has; of a gradient's case the drift C (k, k) and the gradient G,
    which already holds something where it is added to.
    """

    shape: Shape
    weight: Tensor | None = None
    base: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    block: Tensor | None = None
    drift: Tensor | None = None
    grad: Tensor | None = None


def given(problems: Sequence[Problem], name: str) -> list[Tensor]:
    """The tensors of one name that the problems have."""
    tensors: list[Tensor | None] = [getattr(problem, name) for problem in problems]
    return [tensor for tensor in tensors if tensor is not None]


def operands_of(problems: Sequence[Problem]) -> Operands:
    """What the operations read of the problems."""
    return Operands(*(given(problems, name) for name in ("weight", "left", "right", "base", "block")))


class Source:
    """Numbers of a case: the same in every run on a kind of device."""

    def __init__(self, case: Case, device: torch.device, salt: str = "") -> None:
        self.case, self.device = case, device
        self._generator = torch.Generator(device)
        self._generator.manual_seed(zlib.crc32(f"{case!r}{salt}".encode()))

    # -- random numbers ---------------------------------------------------------------------------------

    def random(self, shape: Shape, still: bool = False) -> Problem:
        """Normal numbers. W is near W0, where there is one; ``still``: at W0, as a model of its dtype holds it."""
        case, (m, n, k) = self.case, shape
        left, right = self._random_subspaces(m, n, k)
        if case.operation == "gradient" and case.form == "any":
            drift = self._normal(k, k, 0.01)
            return Problem(shape, left=left, right=right, drift=drift, grad=self._random_gradient(m, n))
        assert case.weight is not None
        pretrained = self._normal(m, n, 0.2).to(case.base or case.weight)
        weight = pretrained.to(case.weight)
        if not still:
            weight = (weight.double() + self._normal(m, n, 0.01)).to(case.weight)
        base = block = None
        if case.base is not None:
            base = self._lying(pretrained, other=True)
        if case.form == "block":
            # Of about the size of what it is subtracted from.
            block = self._normal(k, k, 0.2)
        grad = self._random_gradient(m, n) if case.operation == "gradient" else None
        return Problem(shape, self._lying(weight), base, left, right, block, grad=grad)

    def _random_subspaces(self, m: int, n: int, k: int) -> tuple[Tensor | None, Tensor | None]:
        if self.case.basis is None:
            return None, None
        # Columns of about unit length: C is then of the drift's own size.
        return self._held(self._normal(m, k, m**-0.5)), self._held(self._normal(n, k, n**-0.5))

    def _random_gradient(self, m: int, n: int) -> Tensor:
        assert self.case.grad is not None
        return self._lying(self._normal(m, n, 1e-3).to(self.case.grad))

    def _normal(self, rows: int, cols: int, scale: float) -> Tensor:
        values = torch.empty(rows, cols, dtype=torch.float32, device=self.device)
        return values.normal_(0.0, scale, generator=self._generator)

    # -- numbers whose results are exact ----------------------------------------------------------------

    def exact(self, shape: Shape, number: int) -> Problem:
        """Bases whose columns have one number each, so that every number of C and of G is one product.

        ``number`` % 3 says which factor has all the bits that the arithmetic keeps; the others are powers of two.
        """
        case, (m, n, k) = self.case, shape
        rich = number % 3
        # W0 with U and V in bfloat16: what is projected is rounded to that. Without, all of float32 is kept.
        bits = 8 if case.rounded else 24
        left, right = self._exact_basis(m, k, rich == 1), self._exact_basis(n, k, rich == 2)
        if case.operation == "gradient" and case.form == "any":
            drift = self._numbers(k, k, bits) if rich == 0 else self._signs(k, k)
            return Problem(shape, left=left, right=right, drift=drift, grad=self._exact_gradient(m, n))
        assert case.weight is not None
        full = case.form == "full"
        if case.base is not None and (case.rounded or full):
            # Multiples of 1/64, of which every dtype holds the sum and the difference.
            pretrained = self._numbers(m, n, 7)
            weight = pretrained + (self._numbers(m, n, 7) if rich == 0 or full else self._signs(m, n))
        else:
            pretrained = self._numbers(m, n, 24) if rich == 0 else torch.zeros_like(self._signs(m, n))
            weight = self._numbers(m, n, 24) if rich == 0 else self._signs(m, n)
        base = block = None
        if case.base is not None:
            base = self._lying(pretrained.to(case.base), other=True)
        if case.form == "block":
            block = self._numbers(k, k, 7)
        grad = self._exact_gradient(m, n) if case.operation == "gradient" else None
        return Problem(shape, self._lying(weight.to(case.weight)), base, left, right, block, grad=grad)

    def _exact_basis(self, rows: int, k: int, rich: bool) -> Tensor | None:
        """One number in each of the first ``rows`` columns, each in a row of its own; columns of zeros behind them."""
        if self.case.basis is None:
            return None
        place = torch.randperm(rows, generator=self._generator, device=self.device)[:k]
        chosen = torch.arange(rows, device=self.device)[:, None] == place
        basis = torch.zeros(rows, k, dtype=torch.float32, device=self.device)
        bits = 8 if self.case.basis == torch.bfloat16 else 24
        values = self._numbers(1, len(place), bits) if rich else self._signs(1, len(place))
        basis[:, : len(place)] = chosen * values
        return self._held(basis)

    def _exact_gradient(self, m: int, n: int) -> Tensor:
        assert self.case.grad is not None
        return self._lying(self._numbers(m, n, 7).to(self.case.grad))

    def _numbers(self, rows: int, cols: int, bits: int) -> Tensor:
        """Multiples of 1/64, or of less, with so many significant bits: between -2 and 2."""
        limit = 1 << min(bits, 24)
        values = torch.empty(rows, cols, dtype=torch.float32, device=self.device)
        values.random_(1 - limit, limit, generator=self._generator)
        return values * 2.0 ** (1 - bits)

    def _signs(self, rows: int, cols: int) -> Tensor:
        """Powers of two with either sign: 1/2, 1 and 2."""
        values = torch.empty(rows, cols, dtype=torch.float32, device=self.device)
        values.random_(0, 6, generator=self._generator)
        steps = values.remainder(3)
        return (0.5 + 0.25 * steps * (steps + 1)) * torch.where(values < 3, -1.0, 1.0)

    # -- layouts ----------------------------------------------------------------------------------------

    def _held(self, basis: Tensor) -> Tensor:
        """As anchors hold a basis, but for what lies around it: NaN. Of odd ranks as somebody else may hold it."""
        assert self.case.basis is not None
        basis = basis.to(self.case.basis)
        rows, k = basis.shape
        if k % 4:
            return basis.contiguous()
        buffer = basis.new_full((rows, -(-k // _ROW_MULTIPLE) * _ROW_MULTIPLE), _NAN)
        buffer[:, :k] = basis
        return buffer[:, :k]

    def _lying(self, matrix: Tensor, other: bool = False) -> Tensor:
        """A view with the values of ``matrix`` that lies as the case says; what surrounds it is NaN."""
        kind = self.case.kind
        rows, cols = matrix.shape
        if kind.endswith("transposed") or (kind == "otherwise" and other):
            return matrix.T.contiguous().T
        if kind == "padded":
            view = matrix.new_full((rows, -(-cols // 16) * 16 + 16), _NAN)[:, :cols]
        elif kind == "sliced":
            view = matrix.new_full((rows, 2 * cols), _NAN)[:, ::2]
        elif kind == "shifted":
            view = matrix.new_full((rows * cols + 1,), _NAN)[1:].view(rows, cols)
        else:
            return matrix.contiguous()
        return view.copy_(matrix)
