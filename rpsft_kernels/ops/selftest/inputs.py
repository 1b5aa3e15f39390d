"""Samples that backends are tested with: random numbers, and numbers whose results no order of summation changes.

Nothing here touches torch's own random state, its default dtype or device.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operands import Operands
from .cases import SelfTestCase, Shape

_NAN = float("nan")
# Anchors pad the rows of a basis to a multiple of so many elements.
_ROW_MULTIPLE = 16


@dataclass(frozen=True, eq=False)
class Sample:
    """One weight (m, n) with the pieces that its form has. In a case of gradients it has the drift C (k, k) too, where
    the anchor is not full, and the gradient G with the numbers that are to be added to.
    """

    shape: Shape
    weight: Tensor | None = None
    base: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    block: Tensor | None = None
    drift: Tensor | None = None
    grad: Tensor | None = None


def collect(samples: Sequence[Sample], name: str) -> list[Tensor]:
    """Collect the tensors of one name that the samples have."""
    tensors: list[Tensor | None] = [getattr(sample, name) for sample in samples]
    return [tensor for tensor in tensors if tensor is not None]


def operands_of(samples: Sequence[Sample]) -> Operands:
    """Return the tensors of the samples that operations read."""
    return Operands(*(collect(samples, name) for name in ("weight", "left", "right", "base", "block")))


class Source:
    """Makes the samples of a case. Their numbers are the same in every run on a type of device."""

    def __init__(self, case: SelfTestCase, device: torch.device, salt: str = "") -> None:
        self.case, self.device = case, device
        self._generator = torch.Generator(device)
        # The text is the seed. Another text would test with other numbers than those that kernels have passed with.
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(case).items())
        self._generator.manual_seed(zlib.crc32(f"Case({fields}){salt}".encode()))

    # -- random numbers ---------------------------------------------------------------------------------

    def random(self, shape: Shape, at_anchor: bool = False) -> Sample:
        """Make a sample of normal numbers. W is near W0; ``at_anchor``: it is W0 as a model of W's dtype holds it."""
        case, (m, n, k) = self.case, shape
        left, right = self._random_subspaces(m, n, k)
        if case.operation == "gradient" and case.form == "any":
            drift = self._normal(k, k, 0.01)
            return Sample(shape, left=left, right=right, drift=drift, grad=self._random_gradient(m, n))
        assert case.weight is not None
        pretrained = self._normal(m, n, 0.2).to(case.base or case.weight)
        weight = pretrained.to(case.weight)
        if not at_anchor:
            weight = (weight.double() + self._normal(m, n, 0.01)).to(case.weight)
        base = block = None
        if case.base is not None:
            base = self._lay_out(pretrained, is_base=True)
        if case.form == "block":
            # The block has about the size of the numbers that it is subtracted from.
            block = self._normal(k, k, 0.2)
        grad = self._random_gradient(m, n) if case.operation == "gradient" else None
        return Sample(shape, self._lay_out(weight), base, left, right, block, grad=grad)

    def _random_subspaces(self, m: int, n: int, k: int) -> tuple[Tensor | None, Tensor | None]:
        if self.case.basis is None:
            return None, None
        # With columns of about unit length C has the size of the numbers of W - W0.
        return self._lay_out_basis(self._normal(m, k, m**-0.5)), self._lay_out_basis(self._normal(n, k, n**-0.5))

    def _random_gradient(self, m: int, n: int) -> Tensor:
        assert self.case.grad is not None
        return self._lay_out(self._normal(m, n, 1e-3).to(self.case.grad))

    def _normal(self, rows: int, cols: int, scale: float) -> Tensor:
        values = torch.empty(rows, cols, dtype=torch.float32, device=self.device)
        return values.normal_(0.0, scale, generator=self._generator)

    # -- numbers whose results are exact ----------------------------------------------------------------

    def exact(self, shape: Shape, number: int) -> Sample:
        """Make a sample whose U and V have one number in each column, so that each number of C and G is one product.

        ``number`` % 3 chooses the factor that has all the bits that the arithmetic keeps; the others are powers of two.
        """
        case, (m, n, k) = self.case, shape
        rich = number % 3
        # With W0, and U and V in bfloat16, factors are rounded to bfloat16. Else all bits of float32 are kept.
        bits = 8 if case.may_round else 24
        left, right = self._exact_basis(m, k, rich == 1), self._exact_basis(n, k, rich == 2)
        if case.operation == "gradient" and case.form == "any":
            drift = self._numbers(k, k, bits) if rich == 0 else self._signs(k, k)
            return Sample(shape, left=left, right=right, drift=drift, grad=self._exact_gradient(m, n))
        assert case.weight is not None
        full = case.form == "full"
        if case.base is not None and (case.may_round or full):
            # Every dtype holds the sums and differences of these multiples of 1/64.
            pretrained = self._numbers(m, n, 7)
            weight = pretrained + (self._numbers(m, n, 7) if rich == 0 or full else self._signs(m, n))
        else:
            pretrained = self._numbers(m, n, 24) if rich == 0 else torch.zeros_like(self._signs(m, n))
            weight = self._numbers(m, n, 24) if rich == 0 else self._signs(m, n)
        base = block = None
        if case.base is not None:
            base = self._lay_out(pretrained.to(case.base), is_base=True)
        if case.form == "block":
            block = self._numbers(k, k, 7)
        grad = self._exact_gradient(m, n) if case.operation == "gradient" else None
        return Sample(shape, self._lay_out(weight.to(case.weight)), base, left, right, block, grad=grad)

    def _exact_basis(self, rows: int, k: int, rich: bool) -> Tensor | None:
        """Put one number into each of the first ``rows`` columns, each in a row of its own; other columns are zeros."""
        if self.case.basis is None:
            return None
        place = torch.randperm(rows, generator=self._generator, device=self.device)[:k]
        chosen = torch.arange(rows, device=self.device)[:, None] == place
        basis = torch.zeros(rows, k, dtype=torch.float32, device=self.device)
        bits = 8 if self.case.basis == torch.bfloat16 else 24
        values = self._numbers(1, len(place), bits) if rich else self._signs(1, len(place))
        basis[:, : len(place)] = chosen * values
        return self._lay_out_basis(basis)

    def _exact_gradient(self, m: int, n: int) -> Tensor:
        assert self.case.grad is not None
        return self._lay_out(self._numbers(m, n, 7).to(self.case.grad))

    def _numbers(self, rows: int, cols: int, bits: int) -> Tensor:
        """Draw numbers between -2 and 2 with so many significant bits."""
        limit = 1 << min(bits, 24)
        values = torch.empty(rows, cols, dtype=torch.float32, device=self.device)
        values.random_(1 - limit, limit, generator=self._generator)
        return values * 2.0 ** (1 - bits)

    def _signs(self, rows: int, cols: int) -> Tensor:
        """Draw powers of two with either sign: 1/2, 1 and 2."""
        values = torch.empty(rows, cols, dtype=torch.float32, device=self.device)
        values.random_(0, 6, generator=self._generator)
        steps = values.remainder(3)
        return (0.5 + 0.25 * steps * (steps + 1)) * torch.where(values < 3, -1.0, 1.0)

    # -- layouts ----------------------------------------------------------------------------------------

    def _lay_out_basis(self, basis: Tensor) -> Tensor:
        """Lay a basis out as anchors do, but surrounded by NaN; contiguous for other ranks, as a caller may have it."""
        assert self.case.basis is not None
        basis = basis.to(self.case.basis)
        rows, k = basis.shape
        if k % 4:
            return basis.contiguous()
        buffer = basis.new_full((rows, -(-k // _ROW_MULTIPLE) * _ROW_MULTIPLE), _NAN)
        buffer[:, :k] = basis
        return buffer[:, :k]

    def _lay_out(self, matrix: Tensor, is_base: bool = False) -> Tensor:
        """Return a view with the values of ``matrix`` in the layout of the case; the numbers around it are NaN."""
        kind = self.case.kind
        rows, cols = matrix.shape
        if kind.endswith("transposed") or (kind == "otherwise" and is_base):
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
