"""The cases of the self-test: every form, dtype, layout and orientation that the operations are called with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, product
from typing import Literal

import torch

Operation = Literal["drift", "gradient"]
Form = Literal["base", "block", "bare", "full", "any"]
# Layouts of W and W0, or of the gradient. "even": tiles divide all sizes. "ragged": vectors divide them, tiles do not.
# "padded": rows of any length at aligned addresses. Vectors read none of the others: sizes are odd, those of U and V
# too ("odd"), only every second column is read ("sliced"), addresses are one element off a boundary ("shifted"), W and
# W0 are contiguous along different dimensions ("otherwise").
Kind = Literal[
    "even", "even transposed", "ragged", "ragged transposed", "padded", "odd", "sliced", "shifted", "otherwise"
]
Shape = tuple[int, int, int]

_BOTH = (False, True)
_BF16, _FP32 = torch.bfloat16, torch.float32
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_BASIS_DTYPES = (torch.bfloat16, torch.float32)
# Tile shapes depend on the class of a rank: up to 32, 64, 128, and above.
RANKS = (32, 64, 128, 129)
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", None: "-"}


@dataclass(frozen=True, kw_only=True)
class SelfTestCase:
    """One way to call an operation. Dtypes are None where the call has no such tensor; ``rank`` is the bound of a class
    of ranks, 0 for full anchors; ``tall`` weights have more rows than columns.
    """

    operation: Operation
    form: Form
    weight: torch.dtype | None = None
    base: torch.dtype | None = None
    basis: torch.dtype | None = None
    grad: torch.dtype | None = None
    rank: int
    kind: Kind
    tall: bool
    accumulate: bool = False

    @property
    def line_key(self) -> tuple[str, ...]:
        """The head of the case's line in the table: operation, form, and the dtypes of W, W0, U and V, and gradient."""
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
    def may_round(self) -> bool:
        """True where a backend may round the terms of its sums to bfloat16."""
        return self.basis == torch.bfloat16 and self.form in ("base", "any")

    def small_shapes(self) -> list[Shape]:
        """Return sizes (m, n, k) of weights that are tested in one call: tiles divide all of them, or nothing does."""
        shapes = [self._orient(m, n, k) for (m, n), k in zip(_SMALL[_family(self.kind)], cycle(self._ranks()))]
        return [*shapes[:-1], self._make_odd(shapes[-1])]

    def large_shape(self, of_gpu: bool) -> Shape:
        """Return sizes (m, n, k) of the weights of which many fill a device."""
        m, n = (_LARGE if of_gpu else _MODEST)[_family(self.kind)]
        return self._make_odd(self._orient(m, n, self._ranks()[-1]))

    def _ranks(self) -> Sequence[int]:
        return _RANKS_OF[_family(self.kind)][self.rank] if self.rank else (0,)

    def _orient(self, m: int, n: int, k: int) -> Shape:
        return (n, m, k) if self.tall else (m, n, k)

    def _make_odd(self, shape: Shape) -> Shape:
        """Make one side of a ragged weight odd: the side along which it is not contiguous may be of any size."""
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
# Sums over so many rows are split where C has few tiles, as it has for the last rank of each class below.
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


def all_cases(ranks: Sequence[int] = RANKS) -> Iterator[SelfTestCase]:
    """Combine everything. Of the layouts that no vector reads, odd sizes always come, and one of the others in turn."""
    others: Iterator[Kind] = cycle(("padded", "sliced", "shifted", "otherwise"))
    for basis, rank in product(_BASIS_DTYPES, ranks):
        for weight, base in product(_DTYPES, (None, *_DTYPES)):
            forms: tuple[Form, ...] = ("block", "bare") if base is None else ("base",)
            for form, tall in product(forms, _BOTH):
                for kind in (*_ALIGNED, "odd", next(others)):
                    yield SelfTestCase(
                        operation="drift",
                        form=form,
                        weight=weight,
                        base=base,
                        basis=basis,
                        rank=rank,
                        kind=kind,
                        tall=tall,
                    )
        for grad, accumulate, tall in product(_DTYPES, _BOTH, _BOTH):
            for kind in (*_ALIGNED, "odd", next(others)):
                # Such a gradient reads no weight, so that it serves every form but the full one.
                yield SelfTestCase(
                    operation="gradient",
                    form="any",
                    basis=basis,
                    grad=grad,
                    rank=rank,
                    kind=kind,
                    tall=tall,
                    accumulate=accumulate,
                )
    for weight, base, tall in product(_DTYPES, _DTYPES, _BOTH):
        for kind in ("ragged", "ragged transposed", "odd", next(others)):
            full = SelfTestCase(operation="drift", form="full", weight=weight, base=base, rank=0, kind=kind, tall=tall)
            yield full
            for grad, accumulate in product(_DTYPES, _BOTH):
                yield replace(full, operation="gradient", grad=grad, accumulate=accumulate)


_ALIGNED: tuple[Kind, ...] = ("even", "even transposed", "ragged", "ragged transposed")
# Cases whose calls are repeated. The other layouts have the kernels of odd sizes.
REPEATED: tuple[Kind, ...] = (*_ALIGNED, "odd")


def quick_cases(ranks: Sequence[int]) -> Iterator[SelfTestCase]:
    """Make the cases of default training in bfloat16 and float32: base form, U, V and W0 in bfloat16, contiguous.

    Gradients are added, as ``accumulate_rotation_grad_`` does it, and written, as a backward pass does.
    """
    for rank, dtype, tall in product(ranks, (_BF16, _FP32), _BOTH):
        yield SelfTestCase(
            operation="drift", form="base", weight=dtype, base=_BF16, basis=_BF16, rank=rank, kind="ragged", tall=tall
        )
        for accumulate in (True, False):
            yield SelfTestCase(
                operation="gradient",
                form="any",
                basis=_BF16,
                grad=dtype,
                rank=rank,
                kind="ragged",
                tall=tall,
                accumulate=accumulate,
            )
