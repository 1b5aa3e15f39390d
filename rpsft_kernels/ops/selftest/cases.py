"""What is tested: every form, dtype, layout and orientation that the operations are called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, product
from typing import Literal

import torch

Operation = Literal["drift", "gradient"]
Form = Literal["base", "block", "bare", "full", "any"]
# How W and W0, or the gradient, lie. "even": tiles divide all sizes. "ragged": vectors do, tiles do not. "padded": rows
# of any length at aligned addresses. Vectors read none of the others: "odd" sizes and bases too, every second column
# ("sliced"), one element off a boundary ("shifted"), W and W0 contiguous along different dimensions ("otherwise").
Kind = Literal[
    "even", "even transposed", "ragged", "ragged transposed", "padded", "odd", "sliced", "shifted", "otherwise"
]
Shape = tuple[int, int, int]

_BOTH = (False, True)
_HALF, _FULL = torch.bfloat16, torch.float32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BASES = (torch.bfloat16, torch.float32)
# Rank classes of tile shapes: up to 32, 64, 128, and any.
RANKS = (32, 64, 128, 129)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", None: "-"}


@dataclass(frozen=True)
class Case:
    """One call of an operation. Dtypes are None where the call has no such tensor; ``rank`` is the bound of a class of
    ranks, 0 for full anchors; ``tall`` weights have more rows than columns.
    """

    operation: Operation
    form: Form
    weight: torch.dtype | None
    base: torch.dtype | None
    basis: torch.dtype | None
    grad: torch.dtype | None
    rank: int
    kind: Kind
    tall: bool
    accumulate: bool = False

    @property
    def group(self) -> tuple[str, ...]:
        """What the table shows a line for: operation, form, and the dtypes of W, W0, bases and gradient."""
        return (self.operation, self.form, *(_NAMES[t] for t in (self.weight, self.base, self.basis, self.grad)))

    def __str__(self) -> str:
        dtypes = zip(("W", "W0", "bases", "gradient"), (self.weight, self.base, self.basis, self.grad), strict=True)
        words = [f"{name} {_NAMES[dtype]}" for name, dtype in dtypes if dtype is not None]
        ranks = {0: "", 129: "ranks above 128, "}.get(self.rank, f"ranks up to {self.rank}, ")
        form = f" of {self.form} anchors" if self.form != "any" else ""
        added = {True: ", added", False: ", written"}[self.accumulate] if self.operation == "gradient" else ""
        shape = "tall" if self.tall else "wide"
        return f"{self.operation}{form} ({', '.join(words)}; {ranks}{shape}, {self.kind}{added})"

    @property
    def rounded(self) -> bool:
        """Whether what is summed may have been rounded to bfloat16 before, where a backend does so."""
        return self.basis == torch.bfloat16 and self.form in ("base", "any")

    def small(self) -> list[Shape]:
        """Sizes (m, n, k) of weights that are tested in one call: nothing divides anything, or all tiles divide all."""
        shapes = [self._turned(m, n, k) for (m, n), k in zip(_SMALL[_family(self.kind)], cycle(self._ranks()))]
        return [*shapes[:-1], self._odd(shapes[-1])]

    def large(self, of_gpu: bool) -> Shape:
        """Sizes of the weights of which many fill a device."""
        m, n = (_LARGE if of_gpu else _MODEST)[_family(self.kind)]
        return self._odd(self._turned(m, n, self._ranks()[-1]))

    def _ranks(self) -> Sequence[int]:
        return _RANKS_OF[_family(self.kind)][self.rank] if self.rank else (0,)

    def _turned(self, m: int, n: int, k: int) -> Shape:
        return (n, m, k) if self.tall else (m, n, k)

    def _odd(self, shape: Shape) -> Shape:
        """Of ragged weights the side along which they are not contiguous may be of any size."""
        m, n, k = shape
        if _family(self.kind) != "ragged":
            return shape
        return (m, n + 1, k) if self.kind.endswith("transposed") else (m + 1, n, k)


_SMALL: dict[str, tuple[tuple[int, int], ...]] = {
    "even": ((256, 512), (512, 768)),
    "ragged": ((8, 40), (40, 72), (200, 328)),
    "odd": ((1, 1), (3, 5), (33, 257), (131, 149)),
    "others": ((5, 7), (33, 257), (131, 149)),
}
# Sums over so many rows are split, as long as C has few tiles: the last rank of each class below.
_LARGE = {"even": (1024, 1280), "ragged": (1000, 1096), "odd": (1001, 1097), "others": (1001, 1097)}
_MODEST = {"even": (256, 512), "ragged": (200, 328), "odd": (131, 257), "others": (131, 257)}
_RANKS_OF: dict[str, dict[int, tuple[int, ...]]] = {
    "even": {32: (32,), 64: (64,), 128: (128,), 129: (512, 256)},
    "ragged": {32: (8, 16, 24), 64: (40, 48, 56), 128: (72, 104, 120), 129: (520, 200, 264)},
    "odd": {32: (1, 17, 30, 31), 64: (33, 49, 62, 63), 128: (65, 99, 126, 127), 129: (129, 131, 515, 257)},
    "others": {32: (8, 20, 24), 64: (40, 44, 56), 128: (72, 76, 120), 129: (136, 204, 264)},
}


def _family(kind: Kind) -> str:
    first = kind.split()[0]
    return first if first in ("even", "ragged", "odd") else "others"


def all_cases(ranks: Sequence[int] = RANKS) -> Iterator[Case]:
    """Every combination; of the layouts that no vector reads, odd sizes always and one of the others in turn."""
    others: Iterator[Kind] = cycle(("padded", "sliced", "shifted", "otherwise"))
    for basis, rank in product(_BASES, ranks):
        for weight, base in product(_DTYPES, (None, *_DTYPES)):
            forms: tuple[Form, ...] = ("block", "bare") if base is None else ("base",)
            for form, tall in product(forms, _BOTH):
                for kind in (*_ALIGNED, "odd", next(others)):
                    yield Case("drift", form, weight, base, basis, None, rank, kind, tall)
        for grad, accumulate, tall in product(_DTYPES, _BOTH, _BOTH):
            for kind in (*_ALIGNED, "odd", next(others)):
                yield Case("gradient", "any", None, None, basis, grad, rank, kind, tall, accumulate)
    for weight, base, tall in product(_DTYPES, _DTYPES, _BOTH):
        for kind in ("ragged", "ragged transposed", "odd", next(others)):
            yield Case("drift", "full", weight, base, None, None, 0, kind, tall)
            for grad, accumulate in product(_DTYPES, _BOTH):
                yield Case("gradient", "full", weight, base, None, grad, 0, kind, tall, accumulate)


_ALIGNED: tuple[Kind, ...] = ("even", "even transposed", "ragged", "ragged transposed")
# What is called again and again: the kernels of the other kinds are those of odd sizes.
REPEATED: tuple[Kind, ...] = (*_ALIGNED, "odd")


def quick_cases(ranks: Sequence[int]) -> Iterator[Case]:
    """What training in bfloat16 and float32 uses by default: base form, bases and W0 in bfloat16, contiguous."""
    for rank, dtype, tall in product(ranks, (_HALF, _FULL), _BOTH):
        yield Case("drift", "base", dtype, _HALF, _HALF, None, rank, "ragged", tall)
        yield Case("gradient", "any", None, None, _HALF, dtype, rank, "ragged", tall, True)
