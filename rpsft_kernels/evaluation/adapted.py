"""The weights of a call that adapters move: split from those that are computed whole, and planned.

The plan of a model and its anchors is kept for the next call. It keeps nothing alive that the user has dropped: anchors
are let go with the mapping that holds them, and parameters are known by ``id`` alone.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import weakref
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..anchors.adapted import STANDS_STILL
from ..anchors.anchor import Anchor
from ..anchors.collection import Anchors
from ..anchors.not_weights import find_non_weights
from ..anchors.ties import tied_to
from ..checks import DTYPES, dtype_name
from ..distributed import LocalWeight, ModuleSnapshot, ParameterRef
from ..low_rank import (
    AdaptedLayer,
    AdaptedLayers,
    Batches,
    Factor,
    GroupedProducts,
    LayerSpec,
    facts_of,
    find_adapted,
    project_factors,
    whole_replica,
)
from ..low_rank.dora import image_of_base, square_rows
from ..low_rank.start import AdapterStart
from ..low_rank.started import make_another_weight, start_layer
from ..private_names.bitsandbytes_names import is_quantised
from .bases import StillWeight, check_bases, forget_bases, state_of, still_base


@dataclass(frozen=True, eq=False, slots=True)
class PlannedAdapter:
    """An active adapter of a layer; its factors are places among the plan's.

    Attributes:
        name: PEFT's name of it.
        scaling: s.
        up: the place of B.
        down: the place of A.
        magnitude: the place of DoRA's magnitudes; None for other adapters.
        start: what the adapter was when its weight was anchored; None where that was nothing.
        start_up: ``B0^T U`` (r, k), ``B0^T`` in the full form; None without a start, and for DoRA.
        start_down: ``A0 V`` (r, k), A0 in the full form; None as ``start_up``.
    """

    name: str
    scaling: float
    up: int
    down: int
    magnitude: int | None = None
    start: AdapterStart | None = None
    start_up: Tensor | None = None
    start_down: Tensor | None = None


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
        transposed: whether the base is the transpose of (out, in).
        squares: of the rows of the base (out,), for DoRA.
        base_image: of the base (out, k), for DoRA.
    """

    name: str
    anchor: Anchor
    adapters: tuple[PlannedAdapter, ...]
    up_basis: Tensor | None
    down_basis: Tensor | None
    spec: LayerSpec
    transposed: bool = False
    squares: Tensor | None = None
    base_image: Tensor | None = None

    @property
    def scaled(self) -> bool:
        """Whether its adapter is DoRA's."""
        return self.squares is not None


@dataclass(eq=False)
class AdaptedPlan:
    """The adapted weights of a call, and the anchors of its other weights.

    Attributes:
        layers: the layers whose weights are anchored.
        factors: their factors, without parameters.
        batches: for each device, the places of its layers without DoRA, and their batches.
        dense: the anchors of the weights that are computed whole.
        products: of the factors with U and V, prepared at the first step.
        summary: a text that is equal on ranks which mean the same call.
    """

    layers: list[PlannedLayer]
    factors: list[Factor]
    dense: Mapping[str, Anchor]
    groups: list[Any] = field(default_factory=list)
    batches: list[tuple[list[int], Batches]] = field(default_factory=list)
    products: GroupedProducts = field(default_factory=GroupedProducts)
    summary: str = ""

    def __post_init__(self) -> None:
        by_device: dict[torch.device, list[int]] = {}
        for i, layer in enumerate(self.layers):
            if not layer.scaled:
                by_device.setdefault(layer.spec.device, []).append(i)
        for members in by_device.values():
            self.batches.append((members, Batches([self.layers[i].spec for i in members])))
        self.summary = repr([(layer.name, layer.anchor.rank, layer.spec[:6], layer.scaled) for layer in self.layers])


@dataclass(frozen=True, eq=False)
class AdaptedWeights:
    """The adapted weights of one call: the plan, its factors with their parameters as they are now, and the bases."""

    plan: AdaptedPlan
    factors: list[Factor]
    bases: list[LocalWeight]


class _CachedPlan:
    """A plan, and the state of the model that it was made for."""

    def __init__(
        self,
        model: nn.Module,
        plan: AdaptedPlan,
        layers: Sequence[AdaptedLayer],
        factors: list[Factor],
        resting: Sequence[LocalWeight],
        without_anchors: Sequence[Tensor],
        modules: Sequence[nn.Module],
    ) -> None:
        self.plan = plan
        parameters = [factor.weight.parameter for factor in factors]
        parameters += [layer.base.parameter for layer in layers] + [weight.parameter for weight in resting]
        # What stands still was compared with W0, and is to be again where it has changed. Without an adapter, and
        # without an anchor for that reason, it is to stay frozen.
        self._compared = slice(len(factors), len(parameters))
        self._frozen = slice(len(factors) + len(layers), None)
        self._states_of_still = list(map(state_of, parameters[self._compared]))
        parameters += without_anchors
        self._ids, self._types = list(map(id, parameters)), list(map(type, parameters))
        self._snapshot = ModuleSnapshot(model, parameters)
        self._bases = [layer.base.without_parameter() for layer in layers]
        self._states = [weight.state() for weight in (*[f.weight for f in factors], *[layer.base for layer in layers])]
        # Also of those that no active adapter is on now.
        self._layers = [weakref.ref(module) for module in modules]
        self._facts = [facts_of(_living(module)) for module in self._layers]
        self.watches: list[weakref.ref[Any]] = []

    def match(self) -> AdaptedWeights | None:
        """Return the weights as they are now; None if anything differs that the plan depends on."""
        parameters = self._snapshot.find()
        if parameters is None or list(map(id, parameters)) != self._ids or list(map(type, parameters)) != self._types:
            return None
        if [facts_of(_living(module)) for module in self._layers] != self._facts:
            return None
        if list(map(state_of, parameters[self._compared])) != self._states_of_still:
            return None
        if any(parameter.requires_grad for parameter in parameters[self._frozen]):
            return None
        factors = [
            Factor(factor.name, factor.weight.with_parameter(parameter))
            for factor, parameter in zip(self.plan.factors, parameters, strict=False)
        ]
        bases = [
            base.with_parameter(parameter)
            for base, parameter in zip(self._bases, parameters[len(factors) :], strict=False)
        ]
        if [weight.state() for weight in (*[factor.weight for factor in factors], *bases)] != self._states:
            return None
        return AdaptedWeights(self.plan, factors, bases)


def _living(module: weakref.ref[nn.Module]) -> nn.Module:
    found = module()
    assert found is not None
    return found


_cache: OrderedDict[tuple[int, int], _CachedPlan] = OrderedDict()
_lock = threading.Lock()
_MOST_PLANS = 64


def recall_adapted(weights: object, anchors: object) -> AdaptedWeights | None:
    """Return the adapted weights of an earlier call with this model and these anchors, if nothing has changed since."""
    # torch.compile of torch 2.6 traces no look-up by the identity of a list.
    if torch.compiler.is_compiling() or not isinstance(weights, nn.Module):
        return None
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
    pairs, dense, resting = _split(found, anchors, parameters)
    without_anchors = _check_rest(weights, found, anchors, parameters)
    forget_bases(dense.values())
    still = [still_base(layer.name, layer.base, start_layer(layer, anchor.starts), anchor) for layer, anchor in pairs]
    # Of those that are quantised nothing is compared.
    resting = [name for name in resting if not is_quantised(parameters[name].parameter)]
    standing = {name: whole_replica(parameters[name].locate(name)) for name in resting}
    still += [StillWeight(name, weight, anchors[name]) for name, weight in standing.items()]
    check_bases(still, anchors.fingerprints if isinstance(anchors, Anchors) else {})
    factors = [factor for layer, _ in pairs for factor in layer.factors]
    kept = [Factor(factor.name, factor.weight.without_parameter()) for factor in factors]
    first, planned = 0, []
    for layer, anchor in pairs:
        planned.append(_plan_layer(layer, anchor, first))
        first += len(layer.factors)
    plan = AdaptedPlan(planned, kept, dense, list(groups))
    layers = [layer for layer, _ in pairs]
    if isinstance(anchors, Anchors) and all(factor.weight.lasting for factor in factors):
        cached = _CachedPlan(weights, plan, layers, factors, list(standing.values()), without_anchors, found.modules)
        _remember(weights, anchors, cached)
    return AdaptedWeights(plan, factors, [layer.base for layer in layers])


def _remember(model: nn.Module, anchors: Anchors, cached: _CachedPlan) -> None:
    key = id(model), id(anchors)

    def forget(_: object) -> None:
        _cache.pop(key, None)

    cached.watches = [weakref.ref(model, forget), weakref.ref(anchors, forget)]
    with _lock:
        _cache[key] = cached
        while len(_cache) > _MOST_PLANS:
            _cache.popitem(last=False)


def _check_rest(
    model: nn.Module, found: AdaptedLayers, anchors: Mapping[str, Anchor], parameters: Mapping[str, ParameterRef]
) -> list[Tensor]:
    """Return the weights that have no anchor because they stood still when the model was anchored.

    Raises:
        ValueError: one of them moves now.
    """
    skipped = anchors.skipped if isinstance(anchors, Anchors) else {}
    non_weights: Mapping[str, str] | None = None
    still: list[Tensor] = []
    for name, reason in skipped.items():
        first = tied_to(reason)
        if (reason if first is None else skipped.get(first)) != STANDS_STILL or name not in parameters:
            continue
        if name in found.refused:
            raise ValueError(f"{name}: {found.refused[name]}")
        reference, mover = parameters[name], None
        if name in found.served and found.served[name].adapters:
            mover = f"adapters {', '.join(adapter.name for adapter in found.served[name].adapters)}"
        elif name in found.copies:
            mover = "a trained copy (modules_to_save)"
        elif reference.parameter.ndim == 2 and reference.dtype in DTYPES:
            # A flat parameter of FSDP1 does not tell which of its parts train.
            if reference.parameter.requires_grad:
                # It takes as long as the rest of a plan to find these.
                non_weights = find_non_weights(model, parameters) if non_weights is None else non_weights
                if name in non_weights:
                    continue
                mover = "requires_grad"
            still.append(reference.parameter)
        if mover is not None:
            raise ValueError(
                f"{name}: got a weight with {mover}, expected one that stands still, as it did when the model was "
                "anchored: it has no anchor, so that R would not see it move. Anchor the pretrained model, of which "
                "all weights are anchored, or this one as it trains (Anchors.from_model), and leave out what is meant "
                "to move freely (exclude=...)"
            )
    return still


def _split(
    found: AdaptedLayers, anchors: Mapping[str, Anchor], parameters: Mapping[str, ParameterRef]
) -> tuple[list[tuple[AdaptedLayer, Anchor]], Mapping[str, Anchor], list[str]]:
    """Return the adapted layers with their anchors, the anchors of the weights that are computed whole, and the names
    of those that stand still, frozen and without an adapter, and count 0.
    """
    pairs: list[tuple[AdaptedLayer, Anchor]] = []
    dense: dict[str, Anchor] = {}
    resting: list[str] = []
    for name, anchor in anchors.items():
        if name in found.refused:
            raise ValueError(f"{name}: {found.refused[name]}")
        if name in found.served and found.served[name].adapters:
            pairs.append((found.served[name], anchor))
        elif name not in parameters or parameters[name].parameter.requires_grad or name in found.copies:
            dense[name] = anchor
        else:
            # A layer that none of the active adapters is on stands still, if it computed with its base at the start.
            if name in found.served and isinstance(anchor, Anchor):
                _check_starts(found.served[name], anchor)
            resting.append(name)
    skipped = anchors.skipped if isinstance(anchors, Anchors) else {}
    for name, reason in skipped.items():
        first = tied_to(reason)
        if first is None or first not in anchors or name in anchors or name not in parameters:
            continue
        if name in found.served and first not in found.served:
            pairs.append((found.served[name], anchors[first]))
        elif name in found.served and found.served[name].identity == found.served[first].identity:
            continue
        elif name in found.served or (
            parameters[name].parameter.requires_grad and parameters[name].identity != parameters[first].identity
        ):
            raise ValueError(
                f"{name}: got a weight that moves apart from {first}, anchored as one with it, expected the same ties "
                "as when it was anchored; anchor this model (Anchors.from_model)"
            )
    # Tied ones of which no adapter is active are their first's.
    pairs = [(layer, anchor) for layer, anchor in pairs if layer.adapters]
    names: dict[tuple[int, ...], str] = {}
    for layer, anchor in pairs:
        _check(layer, anchor)
        if names.setdefault(layer.identity, layer.name) != layer.name:
            raise ValueError(
                f"{layer.name}: got one layer with {names[layer.identity]}, anchored as two, expected the same ties as "
                "when it was anchored; anchor this model (Anchors.from_model)"
            )
    if not dense or not isinstance(anchors, Anchors):
        return pairs, dense, resting
    fingerprints = {name: anchors.fingerprints[name] for name in dense if name in anchors.fingerprints}
    return pairs, Anchors(dense, fingerprints=fingerprints), resting


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
    _check_starts(layer, anchor)
    devices = {factor.weight.device for factor in layer.factors}
    if devices - {anchor.device}:
        raise ValueError(
            f"{name}: got adapters on {', '.join(sorted(map(str, devices)))} and the anchor on {anchor.device}, "
            f"expected one device; move the anchor: anchors.to({str(next(iter(devices)))!r})"
        )


def _check_starts(layer: AdaptedLayer, anchor: Anchor) -> None:
    adapters = {adapter.name: adapter for adapter in layer.adapters}
    for name, start in anchor.starts.items():
        adapter = adapters.get(name)
        if adapter is None:
            if make_another_weight({name: start}):
                active = ", ".join(adapters) or "(none)"
                raise ValueError(
                    f"{layer.name}: got active adapters {active}, expected {name!r} among them: it was in "
                    "the weight when that was anchored; activate it (model.set_adapter(...)), or anchor this model"
                )
            continue
        shapes = {"up": adapter.up.weight.shape, "down": adapter.down.weight.shape, "scale": (layer.out_features,)}
        got = {piece: tuple(tensor.shape) for piece, tensor in start.pieces().items()}
        scaled = start.scale is not None and adapter.magnitude is None
        if start.scaling != adapter.scaling or scaled or any(shapes[piece] != shape for piece, shape in got.items()):
            raise ValueError(
                f"{layer.name}: got adapter {name!r} with s = {adapter.scaling} and shapes {shapes}, expected that "
                f"which was anchored, with s = {start.scaling} and shapes {got}; anchor this model (Anchors.from_model)"
            )
        if any(factor.weight.shard.numel != math.prod(factor.weight.shape) for factor in adapter.factors):
            if start.up is not None and anchor.part is not None:
                raise ValueError(
                    f"{layer.name}: got a part of an anchor for adapters that have a start, expected the whole: load "
                    "the anchors without the model (Anchors.load(path)), or anchor it before it is sharded"
                )


def _plan_layer(layer: AdaptedLayer, anchor: Anchor, first: int) -> PlannedLayer:
    """Plan a layer whose factors are the plan's from place ``first`` on."""
    up_basis, down_basis = _bases(layer, anchor)
    dtypes = [factor.weight.dtype for factor in layer.factors]
    dtype = max(map(ops.accumulation_dtype, dtypes), key=lambda dtype: dtype.itemsize, default=torch.float32)
    adapters, place = [], first
    for adapter in layer.adapters:
        start = anchor.starts.get(adapter.name)
        planned = PlannedAdapter(adapter.name, adapter.scaling, place, place + 1, start=start)
        place += len(adapter.factors)
        if adapter.magnitude is not None:
            planned = dataclasses.replace(planned, magnitude=place - 1)
        elif start is not None and start.up is not None and start.down is not None:
            planned = dataclasses.replace(
                planned,
                # B0 and A0 are whole, whatever lies here of B and A.
                start_up=_image(start.up.T, anchor.right if layer.transposed else anchor.left, dtype),
                start_down=_image(start.down, anchor.left if layer.transposed else anchor.right, dtype),
            )
        adapters.append(planned)
    full = anchor.form == "full"
    spec = LayerSpec(
        scalings=tuple(adapter.scaling for adapter in layer.adapters),
        ranks=tuple(adapter.down.weight.shape[0] for adapter in layer.adapters),
        started=tuple(adapter.start_up is not None for adapter in adapters),
        left_columns=layer.out_features if full else anchor.rank,
        right_columns=layer.in_features if full else anchor.rank,
        dtype=dtype,
        device=anchor.device,
    )
    squares = base_image = None
    if layer.adapters[0].magnitude is not None:
        values = layer.base.values().detach()
        rows = values.T if layer.transposed else values
        squares, base_image = square_rows(rows, dtype), image_of_base(rows, down_basis, dtype)
    return PlannedLayer(
        name=layer.name,
        anchor=anchor,
        adapters=tuple(adapters),
        up_basis=up_basis,
        down_basis=down_basis,
        spec=spec,
        transposed=layer.transposed,
        squares=squares,
        base_image=base_image,
    )


def _image(factor: Tensor, basis: Tensor | None, dtype: torch.dtype) -> Tensor:
    return factor.to(dtype) if basis is None else project_factors([factor], [basis], dtype)[0]


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
