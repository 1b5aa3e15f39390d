"""Weights paired with their anchors, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..anchors.anchor import Anchor
from ..checks import check_weight
from ..distributed import (
    LocalWeight,
    ParameterRef,
    Shard,
    assign_shards,
    find_parameters,
    locate_tensor,
)


class Matrix(NamedTuple):
    """A matrix of a weight with its rows of U and V, and of W0."""

    values: Tensor
    left: Tensor | None
    right: Tensor | None
    base: Tensor | None


@dataclass(slots=True)
class AnchoredWeight:
    """One weight with its anchor, under the name that messages give it."""

    name: str
    weight: LocalWeight
    anchor: Anchor

    @property
    def summed(self) -> bool:
        """Whether C is a sum over the ranks of the weight's group."""
        return self.weight.group is not None and self.anchor.form != "full" and not self.weight.shard.unsharded

    def matrices(self, values: Tensor) -> list[Matrix]:
        """The matrices that make up ``values`` (of ``weight.shard.local_shape``): one for each rectangle."""
        anchor, shard, held = self.anchor, self.weight.shard, self.anchor.held
        bases: list[Tensor | None] = [None] * len(shard.rects)
        if anchor.base is not None:
            local = anchor.base if anchor.part is not None else shard.of(anchor.base)
            bases = [view for _, view in shard.views(local)]
        found = []
        for (rect, view), base in zip(shard.views(values), bases, strict=True):
            left, right = anchor.left, anchor.right
            rows, cols = rect.within(held.bounds)
            # Slices of everything are left out: torch.compile traces fewer operations, and tensors stay themselves.
            if left is not None and rect.shape[0] != left.shape[0]:
                left = left[rows]
            if right is not None and rect.shape[1] != right.shape[0]:
                right = right[cols]
            found.append(Matrix(view, left, right, base))
        return found

    @property
    def is_one_matrix(self) -> bool:
        """Whether :meth:`matrices` gives the values themselves with the anchor's tensors themselves."""
        shard, anchor = self.weight.shard, self.anchor
        return shard.flat is None and shard.numel > 0 and (anchor.part is not None or shard.is_whole)


def pair(
    weights: object, anchors: object, parameters: Mapping[str, ParameterRef] | None = None
) -> list[AnchoredWeight]:
    """Every accepted way to say which weights and which anchors, checked and as one list.

    Args:
        parameters: those of a module, where they have been found already.
    """
    if isinstance(weights, nn.Module):
        return _pair_by_name(anchors, find_parameters(weights) if parameters is None else parameters)
    if isinstance(weights, Tensor):
        if not isinstance(anchors, Anchor):
            raise ValueError(f"anchors: got {type(anchors).__name__}, expected one Anchor for one weight tensor")
        return [_anchor_weight("weights", weights, anchors)]
    if not isinstance(weights, Sequence):
        raise ValueError(
            f"weights: got {type(weights).__name__}, expected a tensor, a list of tensors or a torch.nn.Module"
        )
    if not isinstance(anchors, Sequence):
        raise ValueError(
            f"anchors: got {type(anchors).__name__}, expected a list of as many Anchors as there are weights"
        )
    if len(weights) != len(anchors):
        raise ValueError(f"anchors: got {len(anchors)} for {len(weights)} weights, expected one Anchor per weight")
    for i, anchor in enumerate(anchors):
        if not isinstance(anchor, Anchor):
            raise ValueError(f"anchors[{i}]: got {type(anchor).__name__}, expected an Anchor")
    return [_anchor_weight(f"weights[{i}]", w, a) for i, (w, a) in enumerate(zip(weights, anchors, strict=True))]


def _anchor_weight(name: str, weight: object, anchor: Anchor) -> AnchoredWeight:
    check_weight(weight, name, sharded=True)
    term = AnchoredWeight(name, locate_tensor(weight, name), anchor)  # type: ignore[arg-type]
    _check(term)
    return term


def _pair_by_name(anchors: object, parameters: Mapping[str, ParameterRef]) -> list[AnchoredWeight]:
    if not isinstance(anchors, Mapping):
        raise ValueError(
            f"anchors: got {type(anchors).__name__}, expected Anchors for a module "
            "(Anchors.from_model(model, rank) makes them)"
        )
    if not anchors:
        raise ValueError(
            "anchors: got none, expected at least one Anchor: nothing would be regularised "
            "(Anchors.from_model(model, rank) makes them)"
        )
    # By key: torch.compile of torch 2.6 does not trace the items() that a Mapping inherits.
    named = {name: anchors[name] for name in anchors}
    for name, anchor in named.items():
        if not isinstance(anchor, Anchor):
            raise ValueError(f"anchors[{name!r}]: got {type(anchor).__name__}, expected an Anchor")
    gone = [name for name in anchors if name not in parameters]
    if gone:
        shown = ", ".join(map(repr, gone[:5])) + (", ..." if len(gone) > 5 else "")
        raise ValueError(
            f"model: {len(gone)} of {len(anchors)} anchored parameters are gone: {shown}; expected a parameter of each "
            "anchor's name: anchor this model (Anchors.from_model), or leave them out of the anchors"
        )
    terms = []
    for name, anchor in named.items():
        found = parameters[name]
        # A shard is of any shape; what matters is the whole.
        check_weight(
            found.parameter, name, dimensions=found.parameter.ndim if len(found.shape) == 2 else 2, sharded=True
        )
        terms.append(AnchoredWeight(name, found.locate(name), anchor))
    terms = _assign_work(terms)
    for term in terms:
        _check(term)
    return terms


def _assign_work(terms: list[AnchoredWeight]) -> list[AnchoredWeight]:
    """Replicated weights get their parts: what their anchors are of, or a fresh division where those are whole."""
    weights = assign_shards({t.name: t.weight for t in terms}, {t.name: t.anchor.rank for t in terms})
    divided = []
    for term in terms:
        weight = weights[term.name]
        divided.append(AnchoredWeight(term.name, weight.with_work(term.anchor.part), term.anchor))
    return divided


def _check(term: AnchoredWeight) -> None:
    weight, anchor = term.weight, term.anchor
    if tuple(weight.shape) != tuple(anchor.shape):
        raise ValueError(
            f"{term.name}: got shape {tuple(weight.shape)}, expected {tuple(anchor.shape)}: the weight has changed "
            "its shape since it was anchored; anchor it again"
        )
    if anchor.weight_dtype == torch.float64 != weight.dtype:
        # Its pieces are in float64, which no kernel reads.
        raise ValueError(
            f"{term.name}: got {str(weight.dtype).removeprefix('torch.')}, expected float64 like the weight that was "
            "anchored; anchor it again in the dtype that is trained"
        )
    if weight.device != anchor.device:
        raise ValueError(
            f"{term.name}: got a weight on {weight.device} and its anchor on {anchor.device}, expected one device; "
            f"move the anchor: anchors.to({str(weight.device)!r})"
        )
    if anchor.part is not None and (anchor.part != weight.shard or weight.group is None):
        raise ValueError(
            f"{term.name}: got an anchor of {_describe(anchor.part)}, expected one of {_describe(weight.shard)}, which "
            "lies here: pass the model as it was wrapped when it was anchored, or load the anchors with this one "
            "(Anchors.load(path, model))"
        )
    if anchor.part is None and anchor.form == "block" and not weight.shard.is_whole:
        raise ValueError(
            f"{term.name}: got the block of a whole weight, expected that of the part that lies here: only that "
            "cancels exactly; anchor the sharded model (Anchors.from_model), or load the anchors with the pretrained "
            "one (Anchors.load(path, model))"
        )


def _describe(part: Shard) -> str:
    if not part.numel:
        return "nothing"
    if part.flat is not None:
        return f"elements {part.flat[0]}:{part.flat[1]}"
    return f"rows {part.rows[0]}:{part.rows[1]}, columns {part.cols[0]}:{part.cols[1]}"
