"""Pairs each weight with its anchor, and checks that they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..anchors.anchor import Anchor
from ..anchors.collection import check_ties_of
from ..checks import check_weight, dtype_name
from ..distributed import (
    LocalWeight,
    ParameterRef,
    Shard,
    assign_shards,
    find_parameters,
    locate_tensor,
)


class Matrix(NamedTuple):
    """One matrix of a weight, with the rows of U, V and W0 that belong to it."""

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
        """Split ``values``, of shape ``weight.shard.local_shape``, into one matrix for each rectangle of the shard."""
        anchor, shard, held = self.anchor, self.weight.shard, self.anchor.held
        pretrained: list[Tensor | None] = [None] * len(shard.rects)
        if anchor.base is not None:
            local = anchor.base if anchor.part is not None else shard.of(anchor.base)
            pretrained = [view for _, view in shard.views(local)]
        matrices = []
        for (rect, view), base in zip(shard.views(values), pretrained, strict=True):
            left, right = anchor.left, anchor.right
            rows, cols = rect.within(held.bounds)
            # Slices that cover all rows are left out: torch.compile traces less, and tensors stay the anchor's own.
            if left is not None and rect.shape[0] != left.shape[0]:
                left = left[rows]
            if right is not None and rect.shape[1] != right.shape[0]:
                right = right[cols]
            matrices.append(Matrix(view, left, right, base))
        return matrices

    @property
    def is_one_matrix(self) -> bool:
        """Whether :meth:`matrices` would return the values and the anchor's tensors unsliced."""
        shard, anchor = self.weight.shard, self.anchor
        return shard.flat is None and shard.numel > 0 and (anchor.part is not None or shard.is_whole)


def pair(
    weights: object, anchors: object, parameters: Mapping[str, ParameterRef] | None = None
) -> list[AnchoredWeight]:
    """Pair weights with anchors, whichever accepted form they are given in, and check every pair.

    Args:
        weights: a tensor, a sequence of tensors or a module.
        anchors: an Anchor, a sequence of as many, or a mapping from a module's parameter names.
        parameters: the module's parameters, if the caller has found them already.

    Raises:
        ValueError: a type is wrong, lengths differ, an anchored parameter is missing or tied otherwise than when it was
            anchored, or a weight does not fit its anchor.
    """
    if isinstance(weights, nn.Module):
        return _pair_by_name(anchors, find_parameters(weights) if parameters is None else parameters)
    if isinstance(weights, Tensor):
        if not isinstance(anchors, Anchor):
            raise ValueError(f"anchors: got {type(anchors).__name__}, expected one Anchor for one weight tensor")
        return [_pair_tensor("weights", weights, anchors)]
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
    return [_pair_tensor(f"weights[{i}]", w, a) for i, (w, a) in enumerate(zip(weights, anchors, strict=True))]


def _pair_tensor(name: str, weight: object, anchor: Anchor) -> AnchoredWeight:
    check_weight(weight, name, sharded=True)
    anchored = AnchoredWeight(name, locate_tensor(weight, name), anchor)  # type: ignore[arg-type]
    _check(anchored)
    return anchored


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
    # Looked up by key, because torch.compile of torch 2.6 does not trace the items() that a Mapping inherits.
    named = {name: anchors[name] for name in anchors}
    for name, anchor in named.items():
        if not isinstance(anchor, Anchor):
            raise ValueError(f"anchors[{name!r}]: got {type(anchor).__name__}, expected an Anchor")
    missing = [name for name in anchors if name not in parameters]
    if missing:
        shown = ", ".join(map(repr, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"model: {len(missing)} of {len(anchors)} anchored parameters are gone: {shown}; expected a parameter of "
            "each anchor's name: pass the model that was anchored, with the names that it had, or leave these out of "
            "the anchors (anchors of a model that has been trained would restart R at 0)"
        )
    paired = []
    for name, anchor in named.items():
        parameter = parameters[name]
        # A shard may have any number of dimensions; only the whole weight has to be a matrix.
        dimensions = parameter.parameter.ndim if len(parameter.shape) == 2 else 2
        check_weight(parameter.parameter, name, dimensions=dimensions, sharded=True)
        paired.append(AnchoredWeight(name, parameter.locate(name), anchor))
    paired = _assign_work(paired)
    for anchored in paired:
        _check(anchored)
    paired = [AnchoredWeight(each.name, _choose_values(each), each.anchor) for each in paired]
    # This comes last, because a module that is moved to another device may lose its ties there.
    check_ties_of(anchors, parameters)
    return paired


def _assign_work(weights: list[AnchoredWeight]) -> list[AnchoredWeight]:
    """Give each replicated weight its shard: that of its anchor, or one of a new division where the anchor is whole."""
    divided = assign_shards(
        {w.name: w.weight for w in weights},
        {w.name: w.anchor.planned_rank for w in weights},
        [w.name for w in weights if not _takes_masters(w)],
    )
    return [AnchoredWeight(w.name, divided[w.name].with_work(w.anchor.part), w.anchor) for w in weights]


def _choose_values(anchored: AnchoredWeight) -> LocalWeight:
    """Choose what R is computed of: the optimizer's masters where they count, else the model's weight."""
    return anchored.weight.master if _takes_masters(anchored) else anchored.weight


def _takes_masters(anchored: AnchoredWeight) -> bool:
    """Whether R of the optimizer's masters, if there are any, begins at 0 as that of the model's copies does.

    For that W0 must be exact in the copies' dtype: any other is rounded as the copies are, and is not where masters
    begin. Blocks cancel only under the arithmetic that built them, from weights in the copies' dtype.
    """
    weight, anchor = anchored.weight, anchored.anchor
    return anchor.base is not None and weight.dtype in (anchor.weight_dtype, anchor.base.dtype)


def _check(anchored: AnchoredWeight) -> None:
    name, weight, anchor = anchored.name, anchored.weight, anchored.anchor
    if tuple(weight.shape) != tuple(anchor.shape):
        raise ValueError(
            f"{name}: got shape {tuple(weight.shape)}, expected {tuple(anchor.shape)}: the weight has changed "
            "its shape since it was anchored; anchor it again"
        )
    if anchor.weight_dtype == torch.float64 != weight.dtype:
        # The anchor's tensors are float64 then, which no kernel reads.
        raise ValueError(
            f"{name}: got {dtype_name(weight.dtype)}, expected float64 like the weight that was "
            "anchored; anchor it again in the dtype that is trained"
        )
    if weight.device != anchor.device:
        raise ValueError(
            f"{name}: got a weight on {weight.device} and its anchor on {anchor.device}, expected one device; "
            f"move the anchor: anchors.to({str(weight.device)!r})"
        )
    if anchor.part is not None and (anchor.part != weight.shard or weight.group is None):
        raise ValueError(
            f"{name}: got an anchor of {_describe(anchor.part)}, expected one of {_describe(weight.shard)}, which "
            "lies here: pass the model as it was wrapped when it was anchored, or load the anchors with this one "
            "(Anchors.load(path, model))"
        )
    if anchor.part is None and anchor.form == "block" and not weight.shard.is_whole:
        raise ValueError(
            f"{name}: got the block of a whole weight, expected that of the part that lies here: only that "
            "cancels exactly; anchor the sharded model (Anchors.from_model), or load the anchors with the pretrained "
            "one (Anchors.load(path, model))"
        )


def _describe(shard: Shard) -> str:
    if not shard.numel:
        return "nothing"
    if shard.flat is not None:
        return f"elements {shard.flat[0]}:{shard.flat[1]}"
    return f"rows {shard.rows[0]}:{shard.rows[1]}, columns {shard.cols[0]}:{shard.cols[1]}"
