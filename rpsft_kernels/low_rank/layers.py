"""Finds the weights that LoRA's adapters move, and their factors, by the names that the plain model has for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from ..distributed import LocalWeight, ParameterRef, ReplicatedWeight, Shard, named_owners
from ..distributed.dtensor import is_dtensor
from ..private_names import peft_names as peft
from ..private_names.bitsandbytes_names import is_quantised, shape_of_quantised
from .base import QuantisedWeight

_UNMERGE = "got merged adapters, expected adapters beside their base: call model.unmerge_adapter() first"
_ENABLE = "got disabled adapters, expected active ones: call model.base_model.enable_adapter_layers() first"


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of an adapter, B (out, r) or A (r, in), or DoRA's magnitudes (out,), with its parameter's name."""

    name: str
    weight: LocalWeight


@dataclass(frozen=True, slots=True)
class Adapter:
    """One active adapter of a layer: its weight is moved by ``scaling * B A``.

    Attributes:
        name: PEFT's name of it, such as ``"default"``.
        scaling: s.
        up: B (out, r).
        down: A (r, in).
        magnitude: DoRA's magnitudes (out,), which scale the rows of W + s B A; None for other adapters.
    """

    name: str
    scaling: float
    up: Factor
    down: Factor
    magnitude: Factor | None

    @property
    def factors(self) -> list[Factor]:
        return [factor for factor in (self.up, self.down, self.magnitude) if factor is not None]


@dataclass(frozen=True, eq=False)
class AdaptedLayer:
    """A layer whose weight adapters move.

    Attributes:
        name: the weight's canonical name, that of the plain model.
        base: the weight (m, n) below the adapters.
        transposed: whether the base is the transpose of (out, in), as a Conv1D's and an embedding's is.
        adapters: the active ones, in their order.
    """

    name: str
    base: LocalWeight
    transposed: bool
    adapters: tuple[Adapter, ...]

    @property
    def out_features(self) -> int:
        return self.base.shape[1] if self.transposed else self.base.shape[0]

    @property
    def in_features(self) -> int:
        return self.base.shape[0] if self.transposed else self.base.shape[1]

    @property
    def factors(self) -> list[Factor]:
        return [factor for adapter in self.adapters for factor in adapter.factors]

    @property
    def identity(self) -> tuple[int, ...]:
        """Numbers that are equal for layers which are one under two names: of the base, and of all factors."""
        return self.base.identity, *(factor.weight.identity for factor in self.factors)


@dataclass(frozen=True)
class AdaptedLayers:
    """The layers of a model that have adapters, by the canonical name of their weight.

    Attributes:
        served: those whose weight is known to be W + s B A.
        refused: why each other one is not served. Not all of these names are of parameters.
        copies: names of the parameters that PEFT trains as copies (``modules_to_save``), and of their originals.
        modules: all of PEFT's modules, whose :func:`facts_of` decide the others.
    """

    served: dict[str, AdaptedLayer] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    modules: list[nn.Module] = field(default_factory=list)


def find_adapted(model: nn.Module, parameters: Mapping[str, ParameterRef]) -> AdaptedLayers | None:
    """Find the layers of ``model`` that have adapters; None for a model that PEFT has not touched.

    Args:
        model: the model, wrapped or not.
        parameters: those that :func:`rpsft_kernels.distributed.find_parameters` has found in it.
    """
    if not peft.is_adapted(model):
        return None
    found = AdaptedLayers()
    for path, module in named_owners(model).items():
        if peft.is_adapter_layer(module) or peft.is_trained_copy(module):
            found.modules.append(module)
        if peft.is_adapter_layer(module):
            name = _join(path, peft.name_of_weight(module))
            try:
                found.served[name] = _describe(path, module, parameters)
            except ValueError as error:
                found.refused[name] = str(error)
        elif peft.is_trained_copy(module):
            found.copies.update(_copies(path, module, parameters))
    for name in found.refused:
        # Another adapter layer around it moves the same weight.
        found.served.pop(name, None)
    return found


def facts_of(module: nn.Module) -> tuple[object, ...]:
    """Return everything about one of PEFT's modules that may change while its modules and parameters stay the same."""
    # In line, because this runs for every layer at every step.
    if "scaling" not in vars(module):
        return (peft.active_copy(module),) if peft.is_trained_copy(module) else ()
    adapters = peft.active_adapters(module)
    scalings = tuple(peft.scaling_of(module, adapter) for adapter in adapters)
    return adapters, scalings, peft.is_merged(module), peft.is_disabled(module)


def _copies(path: str, module: nn.Module, parameters: Mapping[str, ParameterRef]) -> Iterator[tuple[str, str]]:
    if peft.active_copy(module) is None:
        return
    original = _join(path, "original_module.")
    for name in parameters:
        if name.startswith(original):
            copy = _join(path, name[len(original) :])
            if copy in parameters:
                yield copy, name


def _describe(path: str, module: nn.Module, parameters: Mapping[str, ParameterRef]) -> AdaptedLayer:
    """Describe the layer at ``path``.

    Raises:
        ValueError: it is none that is served.
    """
    reason = peft.reason_no_lora(module)
    if reason is not None:
        raise ValueError(
            f"got {peft.describe_tuner(module)}, expected LoRA's linear layers and embeddings: {reason}; merge the "
            "adapters (model.merge_and_unload()) to evaluate the penalty, or leave the weight out (exclude=...)"
        )
    if peft.is_merged(module):
        raise ValueError(_UNMERGE)
    if peft.is_disabled(module):
        raise ValueError(_ENABLE)
    name = _join(path, "weight")
    base = _locate_base(name, module, parameters)
    names = peft.active_adapters(module)
    transposed = {peft.is_transposed(module, adapter) for adapter in names}
    layer = AdaptedLayer(
        name=name,
        base=base,
        transposed=True in transposed,
        adapters=tuple(_adapter(path, module, adapter, parameters) for adapter in names),
    )
    for adapter in layer.adapters:
        _check_shapes(layer, adapter)
        if adapter.magnitude is not None and len(names) > 1:
            raise ValueError(
                f"got DoRA's adapter {adapter.name!r} beside others, expected it alone: each scales what the others "
                "have added; activate one (model.set_adapter(...))"
            )
    return layer


def _locate_base(name: str, module: nn.Module, parameters: Mapping[str, ParameterRef]) -> LocalWeight:
    layer = peft.base_of(module)
    reference = parameters.get(name)
    if reference is None:
        raise ValueError(
            f"got a {type(layer).__name__} without a parameter of its own for its weight (packed, or part of FSDP1's "
            "flat parameter), expected one that lies here, or is sharded by FSDP2; leave the weight out (exclude=...)"
        )
    parameter = reference.parameter
    if is_quantised(parameter):
        shape = shape_of_quantised(parameter)
        return QuantisedWeight(parameter, shape, Shard.whole(shape), layer=layer)  # type: ignore[arg-type]
    if len(reference.shape) != 2 or not reference.dtype.is_floating_point:
        raise ValueError(
            f"got a base of shape {tuple(reference.shape)} in {reference.dtype}, expected a matrix of floating point "
            "numbers, or one that bitsandbytes holds in 4 or 8 bits; leave the weight out (exclude=...)"
        )
    return whole_replica(reference.locate(name))


def whole_replica(weight: LocalWeight) -> LocalWeight:
    """Return a weight of which every process computes all where every process holds all; others as they are."""
    if isinstance(weight, ReplicatedWeight):
        return LocalWeight(weight.parameter, weight.shape, Shard.whole((weight.shape[0], weight.shape[1])))
    return weight


def _adapter(path: str, module: nn.Module, adapter: str, parameters: Mapping[str, ParameterRef]) -> Adapter:
    up, down = (_factor(path, name, parameters) for name in peft.names_of_factors(module, adapter))
    magnitude = peft.name_of_magnitude(module, adapter)
    return Adapter(
        name=adapter,
        scaling=peft.scaling_of(module, adapter),
        up=up,
        down=down,
        magnitude=None if magnitude is None else _factor(path, magnitude, parameters),
    )


def _factor(path: str, own_name: str, parameters: Mapping[str, ParameterRef]) -> Factor:
    name = _join(path, own_name)
    reference = parameters.get(name)
    if reference is None:
        raise ValueError(
            f"got no parameter {name!r} (FSDP1 flattens them), expected adapters that lie here, or are sharded by FSDP2"
        )
    if len(reference.shape) == 1:
        if is_dtensor(reference.parameter):
            raise ValueError(
                f"got DoRA's magnitudes {name!r} sharded, expected them whole on each rank: the norms of whole rows "
                "are needed; use DistributedDataParallel, or LoRA without DoRA"
            )
        column = (reference.shape[0], 1)
        return Factor(name, LocalWeight(reference.parameter, column, Shard.whole(column)))
    weight = reference.locate(name)
    if isinstance(weight, ReplicatedWeight) and not weight.gradient_error:
        # Every rank adds all of its gradient, whether that is averaged or not.
        weight = whole_replica(weight)
    shard = weight.shard
    if not weight.differentiable or shard.flat is not None or (shard.numel and shard.cols != (0, weight.shape[1])):
        raise ValueError(
            f"got {name!r} as {type(weight).__name__} of {shard}, expected all of it, or some of its rows (FSDP2): "
            "FSDP1, DeepSpeed ZeRO-3 and tensor parallelism of adapters are not served; use FSDP2 or "
            "DistributedDataParallel"
        )
    return Factor(name, weight)


def _check_shapes(layer: AdaptedLayer, adapter: Adapter) -> None:
    rank = adapter.down.weight.shape[0]
    expected = (layer.out_features, rank), (rank, layer.in_features)
    got = adapter.up.weight.shape, adapter.down.weight.shape
    if got != expected:
        raise ValueError(f"got factors of shapes {got[0]} and {got[1]}, expected {expected[0]} and {expected[1]}")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
