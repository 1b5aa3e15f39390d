"""Checks, once, that what lies below adapters is the weight that was anchored: steps do not read it.

What stands still counts 0, and only because it is W0. Of a quantised base the rounding is passed over: the penalty
counts what the adapters add.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..anchors.anchor import Anchor
from ..anchors.fingerprint import Fingerprint
from ..anchors.tensors import compute_block
from ..anchors.verify import shard_sum
from ..checks import dtype_name
from ..distributed import LocalWeight
from ..distributed.dtensor import is_dtensor
from ..low_rank import QuantisedWeight

# Distances from W0, relative to its norm: of a weight that 4 bits hold, about 0.1; of one in another dtype; and of two
# blocks of one weight that different arithmetics have computed.
_QUANTISED = 0.3
_ROUNDED = 2**-7
_ELEMENTS = 1 << 20
# The parameter that each anchor was last found to belong to, and its state.
_found: weakref.WeakKeyDictionary[Anchor, tuple[int, tuple[int, int]]] = weakref.WeakKeyDictionary()


class StillWeight(NamedTuple):
    """A weight that no step moves: the base of adapters with what they were at the start, or one without adapters."""

    name: str
    weight: LocalWeight
    anchor: Anchor
    quantised: bool = False


def state_of(parameter: Tensor) -> tuple[int, int]:
    """Return a parameter's version and address: a difference says that its values may be others.

    ``parameter.data = other`` changes the address alone, and writing into ``parameter.data`` neither of the two.
    """
    # Behind the address of a DTensor there is nothing.
    address = 0 if is_dtensor(parameter) else parameter.data_ptr()
    return -1 if parameter.is_inference() else parameter._version, address


@torch.no_grad()
def check_bases(weights: Sequence[StillWeight], fingerprints: Mapping[str, Fingerprint]) -> None:
    """Raise a ValueError unless the weights are those that were anchored. Each is read once, until it changes.

    Of a shard whose anchor is whole and keeps no W0 nothing here tells; ``Anchors.verify`` does.
    """
    for still in weights:
        parameter = still.weight.parameter
        state = id(parameter), state_of(parameter)
        if _found.get(still.anchor) == state:
            continue
        problem = _find_problem(still, fingerprints.get(still.name))
        if problem is not None:
            raise ValueError(
                f"{still.name}: {problem}: R counts what has moved since, and the base of adapters is taken for W0; "
                "adapt the pretrained model that was anchored, or anchor this one (Anchors.from_model; with "
                "at='now' where PEFT has taken the adapters out of the base, as PiSSA does)"
            )
        _found[still.anchor] = state


def forget_bases(anchors: Iterable[object]) -> None:
    """Let the weights of these anchors be compared once they stand still: they move now, however that is written."""
    for anchor in anchors:
        if isinstance(anchor, Anchor):
            _found.pop(anchor, None)


def _find_problem(still: StillWeight, fingerprint: Fingerprint | None) -> str | None:
    weight, anchor = still.weight, still.anchor
    if tuple(weight.shape) != anchor.shape or not weight.shard.numel:
        return None
    if anchor.part is not None and anchor.part != weight.shard:
        return None
    same_dtype = weight.dtype == anchor.weight_dtype
    bound = _QUANTISED if still.quantised else _ROUNDED
    if anchor.base is not None:
        local = anchor.base if anchor.part is not None else weight.shard.of(anchor.base)
        distance = _distance(weight.values().detach(), local)
        return None if distance == 0.0 else _describe(distance, bound, same_dtype and not still.quantised)
    if fingerprint is not None and same_dtype and weight.shard.is_whole:
        if f"{shard_sum(weight):016x}" == fingerprint.checksum:
            return None
        if not still.quantised:
            return f"got a {dtype_name(weight.dtype)} base with other values than the weight that was anchored"
    if anchor.left is None or anchor.right is None or anchor.block is None or anchor.held != weight.shard:
        return None
    values = weight.values().detach().to(anchor.device)
    block, _ = compute_block(values, anchor.left, anchor.right, anchor.held)
    distance = float((block - anchor.block).norm() / anchor.block.norm().clamp(min=torch.finfo(torch.float32).tiny))
    return _describe(distance, bound, exact=False)


def _describe(distance: float, bound: float, exact: bool) -> str | None:
    if distance <= bound and not exact:
        return None
    return (
        f"got a base at a distance of {distance:.2g} ||W0|| from the weight W0 that was anchored, expected that weight"
    )


def _distance(values: Tensor, pretrained: Tensor) -> float:
    """Return ``||W - W0|| / ||W0||``, with W0 as W's dtype holds it."""
    moved = norm = 0.0
    for rows, base in zip(_chunks(values), _chunks(pretrained), strict=True):
        held = base.to(rows.dtype).to(rows.device)
        if not torch.equal(rows, held):
            moved += float((rows.double() - held.double()).square().sum())
        norm += float(held.double().square().sum())
    return (moved / norm) ** 0.5 if norm else float(moved > 0)


def _chunks(matrix: Tensor) -> Iterator[Tensor]:
    columns = matrix.shape[1] if matrix.ndim == 2 else 1
    yield from torch.split(matrix, max(1, _ELEMENTS // columns))


def still_base(name: str, base: LocalWeight, weight: LocalWeight, anchor: Anchor) -> StillWeight:
    """Return the base of a layer's adapters; ``weight`` is what it makes with their starts."""
    return StillWeight(name, weight, anchor, isinstance(base, QuantisedWeight))
