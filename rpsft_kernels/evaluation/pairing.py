"""Weights with their anchors, checked, and in buckets: what the two operations are called with."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..anchors.anchor import Anchor
from ..checks import check_weight
from ..distributed import LocalWeight, ParameterRef, ReplicatedWeight, Shard, find_parameters, locate_tensor, with_parts

# Anchors whose foreign block has been reported: once per anchor, not once per step.
_reported: weakref.WeakSet[Anchor] = weakref.WeakSet()


@dataclass(frozen=True)
class Term:
    """One weight with its anchor, under the name that messages give it."""

    name: str
    weight: LocalWeight
    anchor: Anchor

    @property
    def summed(self) -> bool:
        """Whether C is a sum over the ranks of the weight's group."""
        return self.weight.group is not None and self.anchor.form != "full" and not self.weight.shard.unsharded

    def tiles(self, values: Tensor) -> list[TileOfTerm]:
        """The matrices that make up ``values`` (of ``weight.shard.local_shape``), with their rows of the bases."""
        anchor, part, held = self.anchor, self.weight.shard, self.anchor.held
        bases: list[Tensor | None] = [None] * len(part.rects)
        if anchor.base is not None:
            local = anchor.base if anchor.part is not None else part.of(anchor.base)
            bases = [view for _, view in part.views(local)]
        tiles = []
        for (tile, view), base in zip(part.views(values), bases, strict=True):
            left, right = anchor.left, anchor.right
            rows, cols = tile.within(held.bounds)
            # Slices of everything are left out: torch.compile traces fewer operations, and tensors stay themselves.
            if left is not None and tile.shape[0] != left.shape[0]:
                left = left[rows]
            if right is not None and tile.shape[1] != right.shape[0]:
                right = right[cols]
            tiles.append(TileOfTerm(view, left, right, base))
        return tiles


@dataclass(frozen=True)
class TileOfTerm:
    """A matrix of a weight or gradient with its rows of U and V, and of W0."""

    values: Tensor
    left: Tensor | None
    right: Tensor | None
    base: Tensor | None


def paired(weights: object, anchors: object, parameters: Mapping[str, ParameterRef] | None = None) -> list[Term]:
    """Every accepted way to say which weights and which anchors, checked and as one list.

    Args:
        parameters: those of a module, where they have been found already.
    """
    if isinstance(weights, nn.Module):
        return _paired_by_name(anchors, find_parameters(weights) if parameters is None else parameters)
    if isinstance(weights, Tensor):
        if not isinstance(anchors, Anchor):
            raise ValueError(f"anchors: got {type(anchors).__name__}, expected one Anchor for one weight tensor")
        return [_term("weights", weights, anchors)]
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
    return [_term(f"weights[{i}]", w, a) for i, (w, a) in enumerate(zip(weights, anchors, strict=True))]


def _term(name: str, weight: object, anchor: Anchor) -> Term:
    check_weight(weight, name, sharded=True)
    term = Term(name, locate_tensor(weight, name), anchor)  # type: ignore[arg-type]
    _check_term(term)
    return term


def _paired_by_name(anchors: object, parameters: Mapping[str, ParameterRef]) -> list[Term]:
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
        terms.append(Term(name, found.locate(name), anchor))
    terms = _divided(terms)
    for term in terms:
        _check_term(term)
    return terms


def _divided(terms: list[Term]) -> list[Term]:
    """Replicated weights get their parts: what their anchors are of, or a fresh division where those are whole."""
    weights = with_parts({t.name: t.weight for t in terms}, {t.name: t.anchor.rank for t in terms})
    divided = []
    for term in terms:
        weight = weights[term.name]
        if isinstance(weight, ReplicatedWeight) and weight.group is not None and term.anchor.part is not None:
            weight = weight.divided(term.anchor.part, weight.group.size())
        divided.append(Term(term.name, weight, term.anchor))
    return divided


def _check_term(term: Term) -> None:
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
            f"{term.name}: got an anchor of {_words(anchor.part)}, expected one of {_words(weight.shard)}, which lies "
            "here: pass the model as it was wrapped when it was anchored, or load the anchors with this one "
            "(Anchors.load(path, model))"
        )
    if anchor.part is None and anchor.form == "block" and not weight.shard.is_whole:
        raise ValueError(
            f"{term.name}: got the block of a whole weight, expected that of the part that lies here: only that "
            "cancels exactly; anchor the sharded model (Anchors.from_model), or load the anchors with the pretrained "
            "one (Anchors.load(path, model))"
        )


def _words(part: Shard) -> str:
    if not part.numel:
        return "nothing"
    if part.flat is not None:
        return f"elements {part.flat[0]}:{part.flat[1]}"
    return f"rows {part.rows[0]}:{part.rows[1]}, columns {part.cols[0]}:{part.cols[1]}"


class _Together(torch.autograd.Function):
    """Tensors as they are, after an empty one. Their gradients are passed on together and in their order, on every
    rank alike whatever it works on: DeepSpeed ZeRO-2 averages gradients in the order in which they come. With
    ``complete`` none is missing."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, complete: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.kinds = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors] if complete else []
        return tensors[0].new_zeros(0, dtype=dtype), *(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, joint: Tensor | None, *grads: Tensor | None) -> Any:  # type: ignore[override]
        found = list(grads)
        for i, (shape, dtype, device) in enumerate(ctx.kinds):
            if found[i] is None and ctx.needs_input_grad[i + 2]:
                # One zero, seen as many.
                found[i] = torch.zeros((), dtype=dtype, device=device).expand(shape)
        return None, None, *found


@dataclass(frozen=True)
class Bucket:
    """Weights of one form, dtype, device and group: the arguments of the two operations."""

    terms: list[Term]
    backend: str

    @property
    def summed(self) -> bool:
        return self.terms[0].summed

    @property
    def group_name(self) -> str | None:
        """Of the processes that these weights lie over; None where this one holds all of them."""
        group = self.terms[0].weight.group
        return None if group is None else group.group_name

    def project(self) -> tuple[list[Tensor], Tensor]:
        """C (k, k) of each weight's part, and their squared norms (of full anchors: those of W - W0).

        C is (0, 0) where it is not needed: of full anchors, and of weights that another rank works on alone, which have
        no norm among the others' either.
        """
        values, joint = self._values()
        drifts, squares = self._project_values(values)
        return drifts, squares if joint is None else torch.cat([squares, joint])

    def _values(self) -> tuple[list[Tensor], Tensor | None]:
        """The parts' values. Those of replicas are tied together in the graph, by an empty summand of the norms."""
        weights = [term.weight for term in self.terms]
        replicas = [weight for weight in weights if isinstance(weight, ReplicatedWeight)]
        if not replicas or not torch.is_grad_enabled() or not any(weight.requires_grad for weight in weights):
            return [weight.values() for weight in weights], None
        joint, *shown = _Together.apply(  # type: ignore[no-untyped-call, unused-ignore]
            ops.accumulation_dtype(weights[0].dtype),
            any(weight.gradient_error for weight in replicas),
            *[weight.parameter for weight in weights],
        )
        return [weight.shard.of(tensor) for weight, tensor in zip(weights, shown, strict=True)], joint

    def _project_values(self, values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        busy = [i for i, t in enumerate(self.terms) if t.weight.shard.numel or not t.weight.shard.unsharded]
        if len(busy) < len(self.terms):
            return self._project_some(busy, values)
        tiles = [term.tiles(value) for term, value in zip(self.terms, values, strict=True)]
        if all(len(each) == 1 for each in tiles):
            return self._project([each[0] for each in tiles], [t.anchor.block for t in self.terms])
        return self._add_up(tiles, values)

    def _project(self, tiles: list[TileOfTerm], blocks: list[Tensor | None]) -> tuple[list[Tensor], Tensor]:
        operands = ops.Operands(
            [t.values for t in tiles],
            [t.left for t in tiles if t.left is not None],
            [t.right for t in tiles if t.right is not None],
            [t.base for t in tiles if t.base is not None],
            [block for block in blocks if block is not None],
        )
        return ops.project_drift(operands, self.backend)

    def _project_some(self, busy: list[int], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        first = self.terms[0].weight
        nothing = torch.zeros((0, 0), dtype=ops.accumulation_dtype(first.dtype), device=first.device)
        if not busy:
            return [nothing] * len(self.terms), nothing.new_zeros(0)
        some = Bucket([self.terms[i] for i in busy], self.backend)
        drifts, squares = some._project_values([values[i] for i in busy])
        found = dict(zip(busy, drifts, strict=True))
        return [found.get(i, nothing) for i in range(len(self.terms))], squares

    def _add_up(self, tiles: list[list[TileOfTerm]], values: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """The same of parts that are no rectangles or empty: tile by tile, then added in their order."""
        listed = [tile for each in tiles for tile in each]
        first = self.terms[0]
        dtype = ops.accumulation_dtype(first.weight.dtype)
        found: list[Tensor] = []
        seen = torch.zeros(0, dtype=dtype, device=first.weight.device)
        if listed:
            found, seen = self._project(listed, [])
        drifts, squares, at = [], [], 0
        for term, each, value in zip(self.terms, tiles, values, strict=True):
            full, rank = term.anchor.form == "full", term.anchor.rank
            own = found[at : at + len(each)]
            # Nothing is added by an empty part but its place in the graph: its gradient is then there, and empty.
            drift = own[0] if own else seen.new_zeros((rank, rank) if term.summed else (0, 0)) + value.sum()
            for other in own[1:]:
                drift = drift + other
            if term.anchor.block is not None and own:
                drift = drift - term.anchor.block
            drifts.append(drift)
            squares.append(
                seen[at : at + len(each)].sum() + (0 if own else value.sum()) if full else drift.square().sum()
            )
            at += len(each)
        return drifts, torch.stack(squares)


def _specification(term: Term) -> ops.WeightSpec:
    # Only facts of the whole weight that every rank shares, so that all ranks form the same buckets; and none of its
    # gradient, so that R is summed in one order, with the same bits, whichever call computes it.
    anchor, weight = term.anchor, term.weight
    left, (rows, cols) = anchor.left, weight.shape
    key = (
        weight.device.type if weight.group is not None else weight.device,
        weight.dtype,
        None if anchor.base is None else anchor.base.dtype,
        None if left is None else left.dtype,
        anchor.block is not None,
        None if weight.group is None else weight.group.group_name,
        term.summed,
    )
    if left is None:
        return ops.WeightSpec(rows, cols, 0, key)
    parts = 1 if anchor.block is None and left.dtype == torch.bfloat16 else 3
    return ops.WeightSpec(rows, cols, anchor.rank, key, parts)


# On the CPU nothing is gained by many weights in one call but the calls' own cost, which matters for small weights at
# small ranks. The backward pass holds the gradients of a bucket. What travels between processes is better sent in few
# pieces.
_CPU_LIMITS = ops.BucketLimits(drift_bytes=1 << 20, elements=16 << 20, one_orientation=False)
_CPU_LIMITS_OF_SHARDS = ops.BucketLimits(drift_bytes=16 << 20, one_orientation=False)


def buckets_of(terms: list[Term]) -> list[Bucket]:
    buckets = []
    limits = None
    if all(term.weight.device.type == "cpu" for term in terms):
        limits = _CPU_LIMITS_OF_SHARDS if any(term.summed for term in terms) else _CPU_LIMITS
    for indices in ops.plan_buckets([_specification(term) for term in terms], limits):
        members = [terms[i] for i in indices]
        weight = members[0].weight
        backend = ops.resolve_backend(weight.device, weight.dtype)
        if not torch.compiler.is_compiling():
            # Here, where all ranks hear of it, not in the middle of a step.
            ops.make_ready(backend, weight.device)
            if members[0].anchor.block is not None:
                _report_foreign_blocks(members, ops.arithmetic_id(backend, weight.device, weight.dtype))
        buckets.append(Bucket(members, backend))
    return buckets


def _report_foreign_blocks(terms: list[Term], arithmetic: str) -> None:
    for term in terms:
        block = term.anchor.block
        if block is None or not block.numel() or term.anchor.arithmetic == arithmetic or term.anchor in _reported:
            continue
        _reported.add(term.anchor)
        # Relative to the block: its norm lies on the GPU, which a step does not wait for.
        residual = torch.finfo(torch.float32).eps ** 2
        warnings.warn(
            f"{term.name}: the anchor's block was computed by {term.anchor.arithmetic!r} and is used by "
            f"{arithmetic!r}, which rounds differently: at the pretrained weight its penalty is not exactly 0 but of "
            f"the order of {residual:.1e} ||B||_F^2, where B is the block. Rebuild it from the pretrained weight: "
            "Anchors.load(path, model) or Anchor.rebuilt_block(weight); or keep the base",
            UserWarning,
            stacklevel=5,
        )
