"""Launches that between them need every variant: what the tests of compiled kernels run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import torch
from torch import Tensor

from accuracy import check_drifts, check_pulled
from emulation import Emulator, profile_of
from planned import planned_for
from rpsft_kernels.ops import Operands
from rpsft_kernels.ops.triton import backend as kernels
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.layout import TYPE_NAMES
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import WEIGHT_AND_BASE, Variant
from support import Problem, exact_drift, operands_of, random_matrix, relative_error

BOTH = (False, True)
TYPES = {name: dtype for dtype, name in TYPE_NAMES.items()}
BASES = (torch.bfloat16, torch.float32)
# Two weights a launch, by the way that operands lie and by rank class: (rows, cols, rank), the shorter side first.
# Several steps along every sum, and tiles that reach beyond the operands; "even": tiles divide them.
SHAPES: dict[str, dict[int, tuple[tuple[int, int, int], ...]]] = {
    "strided": {32: ((72, 133, 31), (33, 65, 17))},
    "aligned": {
        32: ((72, 200, 24), (48, 136, 16)),
        64: ((72, 200, 40), (64, 136, 64)),
        128: ((136, 144, 72), (112, 200, 104)),
        129: ((136, 208, 136), (160, 144, 144)),
    },
    "even": {
        32: ((128, 256, 32),),
        64: ((256, 384, 64), (128, 256, 64)),
        128: ((128, 256, 128),),
        129: ((128, 256, 256),),
    },
}


def split_by_shape(rows: int, rank: int, block_m: int, block_n: int) -> int:
    """Some weights have their sum over rows split, in stretches of which the last may be empty; others have not."""
    return 3 if rows % 16 == 8 or rows == 256 or rank == 128 else 1


def stretches_by_shape(cols: int) -> int:
    """Some weights have their sum over columns cut, in stretches of which the last may be empty; others have not."""
    return 3 if cols % 16 == 8 or cols == 144 else 1


@cache
def numbers(rows: int, cols: int, scale: float, seed: int) -> Tensor:
    return random_matrix(rows, cols, torch.float64, scale=scale, seed=seed)


def moved(shape: tuple[int, int], weight: torch.dtype, base: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """W, which has moved by half its size from a W0 of another dtype, and W0."""
    pretrained = numbers(*shape, 0.2, seed).to(base)
    return (pretrained.to(weight).double() + numbers(*shape, 0.1, seed + 1)).to(weight), pretrained


def placed(tensor: Tensor, way: str) -> Tensor:
    """The same matrix where it lies as badly as its way allows.

    Strided: at any element, every second column. Else at a multiple of 16 bytes and of no more, with 16 bytes between
    the rows that belong to nobody; or without, where ``way`` is "contiguous".
    """
    size = tensor.element_size()
    rows, cols = tensor.shape
    if way == "strided":
        unit, strides = size, (2 * cols, 2)
    else:
        unit, strides = 16, (cols if way == "contiguous" else cols + 16 // size, 1)
    length = 1 + (rows - 1) * strides[0] + (cols - 1) * strides[1]
    frame = torch.full((length + 256 // size,), float("nan"), dtype=tensor.dtype)
    offset = next(i for i in range(256 // size) if (frame.data_ptr() + i * size) % 128 == unit)
    return frame[offset:].as_strided((rows, cols), strides).copy_(tensor)


@dataclass(frozen=True)
class Forward:
    """A launch of ``project_drift``: dtypes of W and W0 (None: no base), whether B is subtracted."""

    weight: torch.dtype
    base: torch.dtype | None
    block: bool
    basis: torch.dtype
    rank: int
    way: str
    tall: bool

    def problems(self) -> list[Problem]:
        found = []
        for i, (rows, cols, k) in enumerate(SHAPES[self.way][self.rank]):
            m, n = (cols, rows) if self.tall else (rows, cols)
            weight, base = moved((m, n), self.weight, self.base or self.weight, i)
            left, right = (numbers(size, k, size**-0.5, 7 + i).to(self.basis) for size in (m, n))
            block = left.double().T @ base.to(self.weight).double() @ right.double() if self.block else None
            found.append(
                Problem(
                    placed(weight, self.way),
                    placed(left, self.way),
                    placed(right, self.way),
                    None if self.base is None else placed(base, self.way),
                    None if block is None else placed(block.float(), "contiguous"),
                )
            )
        return found

    def plan(self) -> None:
        kernels.project_drift(operands_of(self.problems()))

    def run(self, emulator: Emulator) -> None:
        problems = self.problems()
        pieces = operands_of(problems)
        emulator.give(*(piece for kind in pieces for piece in kind))
        with emulator:
            drifts, squares = kernels.project_drift(pieces)
        assert [emulator.unwritten_bytes(result) for result in (*drifts, squares)] == [0] * (len(drifts) + 1)
        check_drifts(problems, drifts, squares)


@dataclass(frozen=True)
class Backward:
    """A launch of ``pull_back``: dtypes of G and of the bases, which lie otherwise where ``strided_grad`` says so."""

    grad: torch.dtype
    basis: torch.dtype
    accumulate: bool
    rank: int
    way: str
    tall: bool

    def pieces(self) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        before, grads, lefts, rights, drifts = [], [], [], [], []
        for i, (rows, cols, k) in enumerate(SHAPES[self.way][self.rank]):
            m, n = (cols, rows) if self.tall else (rows, cols)
            before.append(numbers(m, n, 1.0, i).to(self.grad))
            grads.append(placed(before[-1], self.way))
            lefts.append(placed(numbers(m, k, 0.1, 7 + i).to(self.basis), self.way))
            rights.append(placed(numbers(n, k, 0.1, 17 + i).to(self.basis), self.way))
            drifts.append(placed(numbers(k, k, 1.0, 27 + i).float(), "contiguous"))
        return before, grads, lefts, rights, drifts

    def plan(self) -> None:
        _, grads, lefts, rights, drifts = self.pieces()
        self._call(grads, lefts, rights, drifts, torch.ones(len(grads)))

    def run(self, emulator: Emulator) -> None:
        before, grads, lefts, rights, drifts = self.pieces()
        scales = torch.linspace(-2, 3, len(grads))
        emulator.give(*lefts, *rights, *drifts)
        # Gradients that are overwritten hold nothing before.
        emulator.give(*grads, unwritten=not self.accumulate)
        with emulator:
            self._call(grads, lefts, rights, drifts, scales)
        for i, grad in enumerate(grads):
            assert emulator.unwritten_bytes(grad) == 0
            kept = before[i] if self.accumulate else None
            check_pulled(grad, kept, drifts[i], lefts[i], rights[i], float(scales[i]))

    def _call(
        self, grads: list[Tensor], lefts: list[Tensor], rights: list[Tensor], drifts: list[Tensor], scales: Tensor
    ) -> None:
        kernels.pull_back_into(grads, Operands(lefts=lefts, rights=rights), drifts, scales, self.accumulate)


@dataclass(frozen=True)
class Full:
    """Both directions of full anchors; the gradient alone where ``forward`` is off."""

    weight: torch.dtype
    base: torch.dtype
    grad: torch.dtype
    accumulate: bool
    way: str
    forward: bool

    def pieces(self) -> tuple[list[Problem], list[Tensor], list[Tensor]]:
        problems, before = [], []
        for i, shape in enumerate(((9, 264), (17, 40)) if self.way == "aligned" else ((9, 259), (17, 3))):
            weight, base = moved(shape, self.weight, self.base, i)
            problems.append(Problem(placed(weight, self.way), base=placed(base, self.way)))
            before.append(numbers(*shape, 1.0, i).to(self.grad))
        return problems, before, [placed(grad, self.way) for grad in before]

    def plan(self) -> None:
        problems, _, grads = self.pieces()
        self._call(problems, grads, torch.ones(len(grads)))

    def run(self, emulator: Emulator) -> None:
        problems, before, grads = self.pieces()
        weights, _, _, bases, _ = operands_of(problems)
        scales = torch.linspace(-2, 3, len(grads))
        emulator.give(*weights, *bases)
        emulator.give(*grads, unwritten=not self.accumulate)
        with emulator:
            squares = self._call(problems, grads, scales)
        for i, (problem, grad) in enumerate(zip(problems, grads, strict=True)):
            moved = exact_drift(problem.weight, problem)
            if squares is not None:
                torch.testing.assert_close(squares[i].double(), moved.square().sum(), rtol=1e-5, atol=0.0)
            exact = float(scales[i]) * moved + (before[i].double() if self.accumulate else 0.0)
            assert emulator.unwritten_bytes(grad) == 0
            assert relative_error(grad, exact) <= torch.finfo(self.grad).eps

    def _call(self, problems: Sequence[Problem], grads: list[Tensor], scales: Tensor) -> Tensor | None:
        operands = operands_of(problems)
        drifts, squares = kernels.project_drift(operands) if self.forward else ([], None)
        kernels.pull_back_into(grads, operands, drifts, scales, self.accumulate)
        return squares


Case = Forward | Backward | Full


def ways(architecture: str) -> list[tuple[str, int]]:
    """List the ways in which operands may lie, with the rank classes by which these differ."""
    aligned = ("aligned",) if DESCRIPTORS[architecture] else ("aligned", "even")
    return [("strided", 32), *product(aligned, rank_classes())]


def cases(architecture: str, way: str, rank: int) -> list[Case]:
    """Launches with every variant of one way and class."""
    found: list[Case] = []
    for (weight, base), block, basis, tall in product(WEIGHT_AND_BASE, BOTH, BASES, BOTH):
        if base is None or not block:
            found.append(Forward(TYPES[weight], None if base is None else TYPES[base], block, basis, rank, way, tall))
    for grad, basis, accumulate, tall in product(TYPES.values(), BASES, BOTH, BOTH):
        found.append(Backward(grad, basis, accumulate, rank, way, tall))
    if (way, rank) in (("strided", 32), ("aligned", 32)):
        for (weight, base), grad, accumulate in product(WEIGHT_AND_BASE, TYPES.values(), BOTH):
            if base is not None:
                first = grad == torch.bfloat16 and accumulate
                found.append(Full(TYPES[weight], TYPES[base], grad, accumulate, way, forward=first))
    return found


def asked(architecture: str, case: Case) -> set[Variant]:
    """Return the variants that a case launches."""
    launched: set[Variant] = set()
    with planned_for(profile_of(architecture), lambda variant, programs, arguments: launched.add(variant)):
        case.plan()
    return launched


def chosen(architecture: str, way: str, rank: int) -> list[Case]:
    """Choose the cases that launch a variant that none before them does."""
    seen: set[Variant] = set()
    selected = []
    for case in cases(architecture, way, rank):
        new = asked(architecture, case) - seen
        if new:
            seen |= new
            selected.append(case)
    return selected
