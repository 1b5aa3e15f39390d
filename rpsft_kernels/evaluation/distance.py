"""A warning of weights that are not those which were anchored: other ones, the same ones rounded, or copies.

How far a weight W is from W0 is measured once, when its anchor is first used: ||W - W0|| / ||W0||, in block form
||C|| / ||B|| (an estimate, as the block keeps nothing else of W0). Each process measures what lies here, and decides by
itself. On a GPU the first call waits for these numbers, and no later one does.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..anchors.anchor import Anchor
from ..checks import dtype_name
from .caller import level_of_caller
from .pairing import AnchoredWeight, Matrix
from .plan import Plan, PlannedWeights

# Fine-tuning moves a weight by a few hundredths of its norm; unrelated weights of one norm lie sqrt(2) apart, zeros 1.
_FAR = 0.5
# Rounding moves weights by 0.3 to 0.5 of the dtype's unit roundoff. It moves none by more than the whole of it, whereas
# training moves small weights by as much as large ones.
_LEAST_ROUNDING = 0.1
_SHARE_WITHIN_ROUNDING = 0.99
# Elements of one temporary; no temporary is as large as a weight.
_CHUNK = 1 << 20
_PIECES = 8
# Columns of the matrix by which ||C|| is estimated.
_PROBES = 16
_SHOWN = 5
# Each anchor is measured once, not once per step.
_measured: weakref.WeakSet[Anchor] = weakref.WeakSet()


class _Distance(NamedTuple):
    """What was measured of a weight: the norms of W - W0 and of W0, and the share of elements within rounding."""

    anchored: AnchoredWeight
    moved: float
    pretrained: float
    within_rounding: float

    @property
    def ratio(self) -> float:
        if self.pretrained:
            return self.moved / self.pretrained
        return math.inf if self.moved else 0.0

    def __str__(self) -> str:
        if not self.pretrained:
            return f"{self.anchored.name} (W0 is all zeros: anchored before its values came, or trained from zeros)"
        return f"{self.anchored.name} ({self.ratio:.2g} ||W0||)"


def warn_of_distant_weights(planned: PlannedWeights) -> None:
    """Warn once of all weights that are far from W0, that are W0 in another precision, or that are copies of masters.

    It is one warning, so that where warnings are errors the first weight does not hide the others.
    """
    plan = planned.plan
    if plan.measured_distances or torch.compiler.is_compiling() or _is_captured(plan):
        return
    plan.measured_distances = True
    new = []
    for bucket in plan.buckets:
        # Without a program tensors have no memory to be read.
        for i in bucket.busy if bucket.program is not None else ():
            anchored = planned.weights[i]
            if anchored.weight.shard.numel and anchored.anchor not in _measured:
                _measured.add(anchored.anchor)
                new.append(anchored)
    # Masters may look like W0 in another precision.
    found = _measure([AnchoredWeight(each.name, each.weight.shown, each.anchor) for each in new])
    far = sorted((distance for distance in found if distance.ratio > _FAR), key=lambda d: -d.ratio)
    rounded = [distance for distance in found if distance.ratio <= _FAR and _is_rounding(distance)]
    messages = [*([_tell_far(far, len(found))] if far else []), *([_tell_rounded(rounded)] if rounded else [])]
    copies = [anchored.name for anchored in new if anchored.weight.is_copy]
    messages += [_tell_copies(copies)] if copies else []
    if messages:
        warnings.warn("\n".join(messages), UserWarning, stacklevel=level_of_caller())


def _is_captured(plan: Plan) -> bool:
    """Whether a CUDA graph is captured now, which allows no waits. The step has run outside of a capture, or will."""
    for device in {bucket.device for bucket in plan.buckets if bucket.device.type == "cuda"}:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                return True
    return False


def _tell_far(far: Sequence[_Distance], count: int) -> str:
    return (
        f"weights: {len(far)} of {count} are far from those that were anchored: {_list(far)}; expected less than "
        f"{_FAR} ||W0|| (fine-tuning moves weights by a few hundredths of that, unrelated weights lie at about 1.4). "
        "R counts all of the distance: use the anchors of this very model (of this pipeline stage), or load the "
        "checkpoint that was anchored; Anchors.verify(pretrained_model) compares them bit by bit"
    )


def _tell_rounded(rounded: Sequence[_Distance]) -> str:
    first = rounded[0].anchored
    held, kept = dtype_name(first.weight.dtype), dtype_name(first.anchor.weight_dtype)
    return (
        f"weights: {len(rounded)} are in {held}, were anchored in {kept}, and differ from what was anchored by no more "
        f"than rounding: {_list(rounded)}. R counts that rounding, many times what a step at a learning rate of 1e-6 "
        "adds: anchor the very numbers that are trained, in their dtype (Anchors.from_model after the model is cast, "
        f"or of the {held} checkpoint)"
    )


def _tell_copies(names: Sequence[str]) -> str:
    return (
        f"weights: {len(names)} are copies of masters which DeepSpeed's optimizer keeps (in float32, as a rule) and "
        f"trains: {_list(names)}. R sees only what has crossed a rounding step of the copies: for bfloat16 the error "
        "of its gradient was 94% after 10 steps at a learning rate of 1e-6, and 48% after 100. Masters are found "
        "of the engine itself, where anchors keep W0 and the optimizer is not offloaded; docs/accuracy.md shows how to "
        "pass them elsewhere; or train float32 parameters"
    )


def _list(distances: Sequence[_Distance | str]) -> str:
    more = f" and {len(distances) - _SHOWN} more" if len(distances) > _SHOWN else ""
    return ", ".join(map(str, distances[:_SHOWN])) + more


def _is_rounding(distance: _Distance) -> bool:
    weight, anchor = distance.anchored.weight, distance.anchored.anchor
    unit = max(_unit_roundoff(weight.dtype), _unit_roundoff(anchor.weight_dtype))
    return distance.within_rounding >= _SHARE_WITHIN_ROUNDING and distance.ratio >= _LEAST_ROUNDING * unit


def _unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


# -- the measurement -------------------------------------------------------------------------------------------


@torch.no_grad()
def _measure(weights: Sequence[AnchoredWeight]) -> list[_Distance]:
    """Measure weights of any number of devices, each of which is waited for once."""
    by_device: dict[torch.device, list[tuple[AnchoredWeight, Tensor]]] = {}
    for anchored in weights:
        by_device.setdefault(anchored.weight.device, []).append((anchored, _norms(anchored)))
    distances = []
    for members in by_device.values():
        rows = torch.stack([norms for _, norms in members]).tolist()
        distances += [_Distance(anchored, *row) for (anchored, _), row in zip(members, rows, strict=True)]
    return distances


def _norms(anchored: AnchoredWeight) -> Tensor:
    """Return the norms of W - W0 and of W0, and the share of elements within rounding (0 where that does not count)."""
    matrices = anchored.matrices(anchored.weight.values().detach())
    dtype = ops.accumulation_dtype(anchored.weight.dtype)
    if anchored.anchor.block is not None:
        sums = _estimate_drift(matrices, anchored.anchor.block, dtype)
    else:
        # On a CPU small tensors that outlive their chunk would lie in its memory, and each chunk would take new memory.
        sums = torch.zeros(3, dtype=dtype, device=anchored.weight.device)
        tolerance = 0.0
        if anchored.weight.dtype != anchored.anchor.weight_dtype:
            tolerance = _unit_roundoff(anchored.weight.dtype) + _unit_roundoff(anchored.anchor.weight_dtype)
        for matrix in matrices:
            for values, base in _chunks(matrix):
                sums += _compare(values, base, dtype, tolerance)
    moved, pretrained, within = sums.unbind()
    return torch.stack([moved.sqrt(), pretrained.sqrt(), within / anchored.weight.shard.numel]).to(torch.float32)


def _chunks(matrix: Matrix) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield some rows of a matrix at a time, with those of W0."""
    rows, cols = matrix.values.shape
    step = max(1, min(-(-rows // _PIECES), _CHUNK // cols))
    assert matrix.base is not None
    yield from zip(_split(matrix.values, step), _split(matrix.base, step), strict=True)


def _compare(values: Tensor, base: Tensor, dtype: torch.dtype, tolerance: float) -> Tensor:
    """Return the squared norms of W - W0 and of W0, and the number of elements which rounding explains."""
    moved = values.to(dtype)
    within = moved.new_zeros(())
    if tolerance:
        error = torch.sub(moved, base).abs_()
        within = (error <= moved.abs().mul_(tolerance * 1.001)).sum(dtype=dtype)
    # Kernels cast W0 as a model of the weight's dtype holds it.
    moved = moved.sub(base.to(values.dtype)) if moved is values else moved.sub_(base.to(values.dtype))
    return torch.stack([_square(moved, dtype), _square(base, dtype), within])


def _estimate_drift(matrices: Sequence[Matrix], block: Tensor, dtype: torch.dtype) -> Tensor:
    """Return estimates of ||C||^2 and ||B||^2, by their products with a matrix of few columns."""
    # Numbers without a pattern, made where they are used: random ones of the CPU would have to be waited for.
    index = torch.arange(block.shape[0] * _PROBES, device=block.device)
    probes = (index * index % 65537).to(torch.float32).sin_().view(-1, _PROBES)
    pretrained = block @ probes.to(block.dtype)
    drift = -pretrained
    for values, left, right, _ in matrices:
        assert left is not None and right is not None
        step = max(1, min(-(-values.shape[0] // _PIECES), _CHUNK // values.shape[1]))
        along = (right @ probes.to(right.dtype)).to(dtype)
        for rows, basis in zip(_split(values, step), _split(left, step), strict=True):
            drift += (basis.T @ (rows.to(dtype) @ along).to(basis.dtype)).to(drift.dtype)
    return torch.stack([_square(drift, dtype), _square(pretrained, dtype), drift.new_zeros((), dtype=dtype)])


def _split(matrix: Tensor, rows: int) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = torch.split(matrix, rows)  # type: ignore[no-untyped-call, unused-ignore]
    return pieces


def _square(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm.square()
