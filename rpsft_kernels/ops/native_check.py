"""A comparison of one instruction set of the CPU engine with another, before it is trusted with weights.

It takes no torch, whose modes (fake tensors, transforms) may be on at the first call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

# No extent divides a tile, and sums take several steps. (m, n, k) of a wide and of a tall weight.
_SHAPES = ((70, 133, 40), (200, 45, 33))
# Operands are rounded to bfloat16 twice, 2^-9 each; a wrong operand is off by its whole size.
_BOUND = 2.0**-6


def find_disagreement(module: Any, candidate: str, trusted: str) -> str | None:
    """Return where ``candidate`` computes other numbers than ``trusted``; None where they agree.

    Args:
        module: the compiled engine.
        candidate, trusted: names of its instruction sets.
    """
    for shape in _SHAPES:
        for name in ("bfloat16", "float32"):
            problem = _Problem(module, shape, name)
            pairs = zip(("C", "R", "gradient"), problem.compute(candidate), problem.compute(trusted), strict=True)
            for what, found, expected in pairs:
                # What is found may be infinite.
                with np.errstate(all="ignore"):
                    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
                if not error <= _BOUND:
                    return f"{what} of a {name} weight of shape {shape[:2]} is {error:.2g} off"
    return None


class _Problem:
    """A weight that has moved from W0, with bases in bfloat16."""

    def __init__(self, module: Any, shape: tuple[int, int, int], dtype: str) -> None:
        self._module = module
        m, n, k = shape
        random = np.random.default_rng(0)
        pretrained = random.standard_normal((m, n), np.float32)
        weight: npt.NDArray[np.float32] = pretrained + random.standard_normal((m, n), np.float32) * np.float32(0.0625)
        bits = dtype == "bfloat16"
        self._shape, self._rank = (m, n), k
        self._weight, self._base = (_to_bfloat16(w) if bits else w for w in (weight, pretrained))
        self._left, self._right = (_to_bfloat16(random.standard_normal((size, k), np.float32)) for size in (m, n))

    def compute(self, instruction_set: str) -> tuple[npt.NDArray[np.float32], ...]:
        """Return C (k, k), R and the gradient (m, n), computed with one thread."""
        module = self._module
        drift, square = np.zeros((self._rank, self._rank), np.float32), np.zeros(1, np.float32)
        grad = np.ones(self._shape, np.float32)
        left, right = self._matrix(self._left), self._matrix(self._right)
        projection = module.Projection(
            weight=self._matrix(self._weight),
            base=self._matrix(self._base),
            left=left,
            right=right,
            block=0,
            drift=drift.ctypes.data,
            square=square.ctypes.data,
        )
        module.project_drift([projection], instruction_set, 1)
        pull = module.Pullback(
            grad=self._matrix(grad),
            left=left,
            right=right,
            weight=module.Matrix(),
            base=module.Matrix(),
            drift=drift.ctypes.data,
            scale=0.5,
        )
        module.pull_back([pull], True, instruction_set, 1)
        return drift, square, grad

    def _matrix(self, array: npt.NDArray[Any]) -> Any:
        dtype = self._module.Dtype.bfloat16 if array.dtype == np.uint16 else self._module.Dtype.float32
        return self._module.Matrix(array.ctypes.data, dtype, *array.shape, array.shape[1], 1)


def _to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the upper halves of the bits; what is cut off does not matter here."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)
