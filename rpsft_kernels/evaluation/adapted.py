"""The weights of a call that adapters move: split from those that are computed whole, and planned.

The plan of a model and its anchors is kept for the next call. It keeps nothing alive that the user has dropped: anchors
are let go with the mapping that holds them, and parameters are known by ``id`` alone.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..anchors.anchor import Anchor
from ..anchors.collection import Anchors
from ..anchors.ties import tied_to
from ..checks import dtype_name
from ..distributed import ModuleSnapshot, ParameterRef
from ..low_rank import AdaptedLayer, AdaptedLayers, Batches, Factor, LayerSpec, facts_of, find_adapted


@dataclass(frozen=True, slots=True)
class PlannedAdapter:
    """An active adapter of a layer; its factors are places among the plan's."""

    name: str
    scaling: float
    up: int
    down: int


@dataclass(frozen=True, eq=False, slots=True)
class PlannedLayer:
    """A layer with its anchor.

    Attributes:
        name: the weight's name.
        anchor: its anchor.
        adapters: the active adapters.
        up_basis: the rows of U (of V, where the base is transposed) that belong to the rows of B here; None in the full
            form.
        down_basis: V (U, where the base is transposed); None in the full form.
        spec: the properties that decide its batch.
    """

    name: str
    anchor: Anchor
    adapters: tuple[PlannedAdapter, ...]
    up_basis: Tensor | None
    down_basis: Tensor | None
    spec: LayerSpec


@dataclass(eq=False)
class AdaptedPlan:
    """The adapted weights of a call, and the anchors of its other weights.

    Attributes:
        layers: the layers whose weights are anchored.
        factors: their factors, without parameters.
        batches: for each device, the places of its layers and their batches.
        dense: the anchors of the weights that are computed whole.
        summary: a text that is equal on ranks which mean the same call.
    """

    layers: list[PlannedLayer]
    factors: list[Factor]
    dense: Mapping[str, Anchor]
    groups: list[Any] = field(default_factory=list)
    batches: list[tuple[list[int], Batches]] = field(default_factory=list)
    summary: str = ""

    def __post_init__(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for i, layer in enumerate(self.layers):
            by_device.setdefault(layer.spec.device, []).append(i)
        for members in by_device.values():
            self.batches.append((members, Batches([self.layers[i].spec for i in members])))
        self.summary = repr([(layer.name, layer.anchor.rank, layer.spec[:5], layer.adapters) for layer in self.layers])


@dataclass(frozen=True, eq=False)
class AdaptedWeights:
    """The adapted weights of one call: the plan, and its factors with their parameters as they are now."""

    plan: AdaptedPlan
    factors: list[Factor]


class _CachedPlan:
    """A plan, and the state of the model that it was made for."""

    def __init__(
        self, model: nn.Module, plan: AdaptedPlan, layers: Sequence[AdaptedLayer], factors: list[Factor]
    ) -> None:
        self.plan = plan
        parameters = [factor.weight.parameter for factor in factors]
        parameters += [layer.base.parameter for layer in layers]
        self._ids, self._types = list(map(id, parameters)), list(map(type, parameters))
        self._snapshot = ModuleSnapshot(model, parameters)
        self._states = [factor.weight.state() for factor in factors]
        self._layers = [layer.module for layer in layers]
        self._facts = [facts_of(_living(module)) for module in self._layers]
        self.watches: list[weakref.ref[Any]] = []

    def match(self) -> AdaptedWeights | None:
        """Return the weights as they are now; None if anything differs that the plan depends on."""
        parameters = self._snapshot.find()
        if parameters is None or list(map(id, parameters)) != self._ids or list(map(type, parameters)) != self._types:
            return None
        if [facts_of(_living(module)) for module in self._layers] != self._facts:
            return None
        factors = [
            Factor(factor.name, factor.weight.with_parameter(parameter))
            for factor, parameter in zip(self.plan.factors, parameters, strict=False)
        ]
        if [factor.weight.state() for factor in factors] != self._states:
            return None
        return AdaptedWeights(self.plan, factors)


def _living(module: weakref.ref[nn.Module]) -> nn.Module:
    found = module()
    assert found is not None
    return found


_cache: OrderedDict[tuple[int, int], _CachedPlan] = OrderedDict()
_lock = threading.Lock()
_MOST_PLANS = 64


def recall_adapted(weights: object, anchors: object) -> AdaptedWeights | None:
    """Return the adapted weights of an earlier call with this model and these anchors, if nothing has changed since."""
    cached = _cache.get((id(weights), id(anchors)))
    return None if cached is None else cached.match()


def find_adapted_weights(
    weights: object, anchors: object, parameters: Mapping[str, ParameterRef] | None, groups: Sequence[Any]
) -> AdaptedWeights | None:
    """Split the anchored weights of a model into those that adapters move and the others.

    Args:
        weights: the first argument of the call.
        anchors: the second.
        parameters: the model's.
        groups: the process groups of the model's weights.

    Returns:
        None for anything but a model that PEFT has touched with a mapping of anchors.

    Raises:
        ValueError: an anchored weight has adapters that are not served, or does not fit its anchor.
    """
    if not isinstance(weights, nn.Module) or not isinstance(anchors, Mapping) or parameters is None:
        return None
    found = find_adapted(weights, parameters)
    if found is None:
        return None
    pairs, dense = _split(found, anchors, parameters)
    factors = [factor for layer, _ in pairs for factor in layer.factors]
    kept = [Factor(factor.name, factor.weight.without_parameter()) for factor in factors]
    first, planned = 0, []
    for layer, anchor in pairs:
        planned.append(_plan_layer(layer, anchor, first))
        first += len(layer.factors)
    plan = AdaptedPlan(planned, kept, dense, list(groups))
    layers = [layer for layer, _ in pairs]
    if isinstance(anchors, Anchors) and all(factor.weight.lasting for factor in factors):
        _remember(weights, anchors, _CachedPlan(weights, plan, layers, factors))
    return AdaptedWeights(plan, factors)


def _remember(model: nn.Module, anchors: Anchors, cached: _CachedPlan) -> None:
    key = id(model), id(anchors)

    def forget(_: object) -> None:
        _cache.pop(key, None)

    cached.watches = [weakref.ref(model, forget), weakref.ref(anchors, forget)]
    with _lock:
        _cache[key] = cached
        while len(_cache) > _MOST_PLANS:
            _cache.popitem(last=False)


def _split(
    found: AdaptedLayers, anchors: Mapping[str, Anchor], parameters: Mapping[str, ParameterRef]
) -> tuple[list[tuple[AdaptedLayer, Anchor]], Mapping[str, Anchor]]:
    """Return the adapted layers with their anchors, and the anchors of all weights that have to be looked at whole.

    A frozen weight without an adapter stands still, and counts 0.
    """
    pairs: list[tuple[AdaptedLayer, Anchor]] = []
    dense: dict[str, Anchor] = {}
    for name, anchor in anchors.items():
        if name in found.refused:
            raise ValueError(f"{name}: {found.refused[name]}")
        if name in found.served:
            pairs.append((found.served[name], anchor))
        elif name not in parameters or parameters[name].parameter.requires_grad or name in found.copies:
            dense[name] = anchor
    skipped = anchors.skipped if isinstance(anchors, Anchors) else {}
    for name, reason in skipped.items():
        first = tied_to(reason)
        if first is None or first not in anchors or name in anchors or name not in parameters:
            continue
        if name in found.served and first not in found.served:
            pairs.append((found.served[name], anchors[first]))
        elif name in found.served or (
            parameters[name].parameter.requires_grad and parameters[name].identity != parameters[first].identity
        ):
            raise ValueError(
                f"{name}: got a weight that moves apart from {first}, anchored as one with it, expected the same ties "
                "as when it was anchored; anchor this model (Anchors.from_model)"
            )
    # A layer that none of the active adapters is on stands still.
    pairs = [(layer, anchor) for layer, anchor in pairs if layer.adapters]
    for layer, anchor in pairs:
        _check(layer, anchor)
    if not dense or not isinstance(anchors, Anchors):
        return pairs, dense
    fingerprints = {name: anchors.fingerprints[name] for name in dense if name in anchors.fingerprints}
    return pairs, Anchors(dense, fingerprints=fingerprints)


def _check(layer: AdaptedLayer, anchor: Anchor) -> None:
    name, base = layer.name, layer.base
    if not isinstance(anchor, Anchor):
        raise ValueError(f"anchors[{name!r}]: got {type(anchor).__name__}, expected an Anchor")
    if tuple(base.shape) != tuple(anchor.shape):
        raise ValueError(
            f"{name}: got shape {tuple(base.shape)}, expected {tuple(anchor.shape)}: the weight has changed "
            "its shape since it was anchored; anchor it again"
        )
    if base.requires_grad:
        raise ValueError(
            f"{name}: got a base that requires grad below its adapters, expected a frozen one: the penalty sees the "
            "adapters move, and not the base; freeze it (requires_grad_(False)), or train it without adapters"
        )
    dtypes = {factor.weight.dtype for factor in layer.factors}
    if anchor.weight_dtype == torch.float64 and dtypes != {torch.float64}:
        raise ValueError(
            f"{name}: got adapters in {', '.join(sorted(map(dtype_name, dtypes)))}, expected float64 like the weight "
            "that was anchored; anchor it again in the dtype that is trained"
        )
    devices = {factor.weight.device for factor in layer.factors}
    if devices - {anchor.device}:
        raise ValueError(
            f"{name}: got adapters on {', '.join(sorted(map(str, devices)))} and the anchor on {anchor.device}, "
            f"expected one device; move the anchor: anchors.to({str(next(iter(devices)))!r})"
        )


def _plan_layer(layer: AdaptedLayer, anchor: Anchor, first: int) -> PlannedLayer:
    """Plan a layer whose factors are the plan's from place ``first`` on."""
    adapters, place = [], first
    for adapter in layer.adapters:
        adapters.append(PlannedAdapter(adapter.name, adapter.scaling, place, place + 1))
        place += len(adapter.factors)
    up_basis, down_basis = _bases(layer, anchor)
    dtypes = [factor.weight.dtype for factor in layer.factors]
    full = anchor.form == "full"
    spec = LayerSpec(
        scalings=tuple(adapter.scaling for adapter in layer.adapters),
        ranks=tuple(adapter.down.weight.shape[0] for adapter in layer.adapters),
        started=tuple(False for _ in layer.adapters),
        left_columns=layer.out_features if full else anchor.rank,
        right_columns=layer.in_features if full else anchor.rank,
        dtype=max(map(ops.accumulation_dtype, dtypes), key=lambda dtype: dtype.itemsize, default=torch.float32),
        device=anchor.device,
    )
    return PlannedLayer(layer.name, anchor, tuple(adapters), up_basis, down_basis, spec)


def _bases(layer: AdaptedLayer, anchor: Anchor) -> tuple[Tensor | None, Tensor | None]:
    """Return the rows of the two bases that belong to what lies here of B and of A."""
    if anchor.left is None or anchor.right is None or not layer.adapters:
        return None, None
    rows = layer.adapters[0].up.weight.shard.rows
    if any(adapter.up.weight.shard.rows != rows for adapter in layer.adapters):
        raise ValueError(f"{layer.name}: got adapters that are sharded in different ways, expected one way for all")
    inputs = (0, layer.in_features)
    held, bases = anchor.held, []
    sides = [("left", anchor.left, held.rows), ("right", anchor.right, held.cols)]
    if layer.transposed:
        sides.reverse()
    for (side, basis, span), wanted in zip(sides, (rows, inputs), strict=True):
        if wanted[0] == wanted[1]:
            bases.append(basis[:0])
            continue
        if wanted[0] < span[0] or wanted[1] > span[1]:
            raise ValueError(
                f"{layer.name}: got an anchor of rows {span[0]}:{span[1]} of its {side} basis, expected rows "
                f"{wanted[0]}:{wanted[1]} for the adapters that lie here: anchor the model before it is sharded, or "
                "load the anchors without it (Anchors.load(path))"
            )
        cut = basis[wanted[0] - span[0] : wanted[1] - span[0]]
        bases.append(basis if cut.shape == basis.shape else cut)
    return bases[0], bases[1]
