"""The two products with U and V on the grouped kernels, where these serve: all layers in a few launches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .products import add_products_, project_factors

# The dtypes that kernels read and write.
_READABLE = frozenset((torch.bfloat16, torch.float16, torch.float32))


class _Extents(NamedTuple):
    """The properties that factors of a launch share. ``turn``: how often their memory came before in the call."""

    r: int
    k: int
    device: torch.device
    turn: int


class GroupedProducts:
    """The products of one plan. What was prepared for a step serves the next.

    Factors that the kernels do not serve go through :mod:`rpsft_kernels.low_rank.products`: those on other devices, in
    float64, or empty.
    """

    def __init__(self) -> None:
        self._programs: dict[tuple[str, _Extents, int], ops.FactorProgram] = {}
        self._lock = threading.Lock()

    def project(self, factors: Sequence[Tensor], bases: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Compute images, as :func:`project_factors`."""
        if torch.is_grad_enabled() and any(factor.requires_grad for factor in factors):
            # Autograd does not see what kernels do.
            return project_factors(factors, bases, dtype)
        images: dict[int, Tensor] = {}
        plain, groups = _sort(factors, bases, dtype)
        for extents, members in groups.items():
            program = self._program("project", extents, len(members))
            run = program.begin()
            try:
                operation = run.stage_factors(0, [factors[i] for i in members], [bases[i] for i in members])
                run.send()
                images.update(zip(members, run.project_factors(operation).unbind(), strict=True))
            finally:
                program.end(run)
        if plain:
            found = project_factors([factors[i] for i in plain], [bases[i] for i in plain], dtype)
            images.update(zip(plain, found, strict=True))
        return [images[i] for i in range(len(factors))]

    def add_(
        self,
        grads: Sequence[Tensor],
        coefficients: Sequence[Tensor],
        bases: Sequence[Tensor],
        accumulate: Sequence[bool],
    ) -> None:
        """Add to gradients or write them, as :func:`add_products_`."""
        plain, groups = _sort(grads, bases, coefficients[0].dtype if coefficients else torch.float32)
        for extents, members in sorted(groups.items(), key=lambda group: group[0].turn):
            # The kernels add.
            for i in members:
                if not accumulate[i]:
                    grads[i].zero_()
            program = self._program("add", extents, len(members))
            run = program.begin()
            try:
                operation = run.stage_factor_gradients(0, [grads[i] for i in members], [bases[i] for i in members])
                run.send()
                run.add_factors_(operation, torch.stack([coefficients[i] for i in members]))
            finally:
                program.end(run)
        if plain:
            add_products_(*([each[i] for i in plain] for each in (grads, coefficients, bases, accumulate)))  # type: ignore[arg-type]

    def _program(self, kind: str, extents: _Extents, count: int) -> ops.FactorProgram:
        key = kind, extents, count
        with self._lock:
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = ops.prepare_factors(extents.device, [count])
        return program


def _sort(
    matrices: Sequence[Tensor], bases: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[int], dict[_Extents, list[int]]]:
    """Return the places of factors or gradients that the kernels do not serve, and of the others by their extents."""
    plain: list[int] = []
    groups: dict[_Extents, list[int]] = {}
    served: dict[torch.device, bool] = {}
    # A factor of several layers has one gradient, which one launch may add to only once.
    turns: dict[int, int] = {}
    for i, (matrix, basis) in enumerate(zip(matrices, bases, strict=True)):
        device = matrix.device
        if device not in served:
            served[device] = dtype == torch.float32 and ops.resolve_backend(device, dtype) == "triton"
        if served[device] and matrix.numel() and {matrix.dtype, basis.dtype} <= _READABLE:
            turn = turns[matrix.data_ptr()] = turns.get(matrix.data_ptr(), -1) + 1
            groups.setdefault(_Extents(matrix.shape[0], basis.shape[1], device, turn), []).append(i)
        else:
            plain.append(i)
    return plain, groups
