"""Starts of a model's adapters, and the weights that they make with their bases."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from .. import ops
from ..distributed import LocalWeight, ReplicatedWeight
from ..private_names.peft_names import knows_start, start_in_the_base
from .dora import ScaledWeight, scale_rows, square_rows
from .layers import AdaptedLayer, Adapter
from .start import AdapterStart

At = Literal["base", "now"]
MOMENTS: tuple[At, ...] = get_args(At)
# How far PEFT's magnitudes are from the norms that they were made of, by the rounding of either.
_ROUNDING = 2**-6
# Elements of a weight that are made at a time, in float64: as in products.py.
_CPU_ELEMENTS = 1 << 18
_GPU_ELEMENTS = 1 << 24


@torch.no_grad()
def take_starts(model: nn.Module, layer: AdaptedLayer, at: At) -> dict[str, AdapterStart]:
    """Return the starts of a layer's adapters that are not nothing, by their names.

    Args:
        model: the whole model, which knows how its adapters were initialised.
        layer: the layer.
        at: "base" counts the drift from the weight below the adapters, "now" from that which the layer computes with.

    Raises:
        ValueError: the weight below is not the pretrained one, or that is not known; or adapters are sharded that have
            a start.
    """
    starts = {}
    for adapter in layer.adapters:
        start = _take_start(model, layer, adapter, at)
        if start.pieces():
            starts[adapter.name] = start
    return starts


class StartBytes(NamedTuple):
    """The bytes of what :func:`take_starts` returns for a layer; ``at_most`` where its values are not known."""

    nbytes: int
    at_most: bool


def count_start_bytes(model: nn.Module, layer: AdaptedLayer, at: At) -> StartBytes:
    """Count the bytes of the starts of a layer's adapters, which may be on the meta device.

    Raises:
        ValueError: as :func:`take_starts`.
    """
    if all(factor.weight.device.type != "meta" for factor in layer.factors):
        return StartBytes(sum(start.nbytes for start in take_starts(model, layer, at).values()), False)
    count = 0
    for adapter in layer.adapters:
        up, down = adapter.up.weight, adapter.down.weight
        if at == "now":
            count += sum(math.prod(weight.shape) * weight.dtype.itemsize for weight in (up, down))
        if adapter.magnitude is not None:
            count += layer.out_features * _scale_dtype(up.dtype).itemsize
    return StartBytes(count, count > 0)


def _take_start(model: nn.Module, layer: AdaptedLayer, adapter: Adapter, at: At) -> AdapterStart:
    factors: dict[str, Tensor] = {}
    up, down = (factor.weight.values().detach() for factor in (adapter.up, adapter.down))
    moved = bool(up.any()) and bool(down.any())
    if moved or _is_sharded(adapter):
        taken_out = start_in_the_base(model, adapter.name)
        if taken_out is not None and at == "base":
            raise ValueError(
                f"{layer.name}: got adapter {adapter.name!r} with init_lora_weights={taken_out!r}, which has taken the "
                "adapter out of the base, so that the base is not the pretrained weight: pass at='now' where the "
                "adapters are as they were initialised; to go on with a training, load the anchors of its start "
                "(Anchors.load(path))"
            )
        if moved and at == "base" and not knows_start(model, adapter.name):
            raise ValueError(
                f"{layer.name}: got adapter {adapter.name!r} with values in a part of a model that knows no "
                "configuration of it (peft_config), expected the model that PEFT has adapted: only that tells whether "
                "the adapter was taken out of the base, as PiSSA does; pass the whole model (with include=... for a "
                "part of its weights)"
            )
    if at == "now" and _is_sharded(adapter):
        raise ValueError(
            f"{layer.name}: got at='now' for adapter {adapter.name!r}, of which some rows lie here, expected all: "
            "anchor the model before it is sharded"
        )
    if at == "now" and moved:
        factors = {"up": up.clone(), "down": down.clone()}
    if adapter.magnitude is not None:
        scale = _scale_of(layer, adapter)
        # A fresh adapter has a scale of 1 but for rounding, from which it is to count; one that has been trained has
        # moved away from 1, and that is drift.
        if at == "now" or (not moved and bool(((scale - 1).abs() < _ROUNDING).all())):
            factors["scale"] = scale
    return AdapterStart(adapter.scaling, **factors)


def make_another_weight(starts: Mapping[str, AdapterStart]) -> bool:
    """Whether a layer whose adapters are at these starts computes with another weight than its base."""
    return any(start.up is not None or _is_scaled(start) for start in starts.values())


def _is_scaled(start: AdapterStart) -> bool:
    return start.scale is not None and bool(((start.scale - 1).abs() >= _ROUNDING).any())


def _is_sharded(adapter: Adapter) -> bool:
    weights = [adapter.up.weight, adapter.down.weight]
    return any(weight.group is not None and not isinstance(weight, ReplicatedWeight) for weight in weights)


def _scale_of(layer: AdaptedLayer, adapter: Adapter) -> Tensor:
    weight = scaled_weight(layer.base, layer.transposed, adapter)
    return scale_rows(weight, square_rows(weight.base, _scale_dtype(weight.up.dtype)))


def _scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scaled_weight(base: LocalWeight, transposed: bool, adapter: Adapter) -> ScaledWeight:
    """Return what DoRA's formulas need of a layer's values, without a start."""
    assert adapter.magnitude is not None
    values = base.values().detach()
    return ScaledWeight(
        base=values.T if transposed else values,
        up=adapter.up.weight.values(),
        down=adapter.down.weight.values(),
        magnitude=adapter.magnitude.weight.values(),
        scaling=adapter.scaling,
        start=None,
    )


@dataclass(frozen=True)
class StartedWeight(LocalWeight):
    """The weight that a layer computes with where its adapters are at ``starts``: W0 of anchors that count from them.

    Every reading of its values makes it anew.

    Attributes:
        layer: the layer with its base and adapters.
        starts: of its adapters, by their names. Those that are not there add nothing.
    """

    layer: AdaptedLayer | None = None
    starts: Mapping[str, AdapterStart] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        assert self.layer is not None
        return self.layer.base.dtype

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return the weight, with the same bits on every device that has float64: fingerprints are taken of them."""
        assert self.layer is not None
        base = self.layer.base.values().detach()
        weight = base.clone(memory_format=torch.contiguous_format)
        # The view has the outputs in its rows.
        rows, outputs, inputs = weight, self.shard.rows, slice(*self.shard.cols)
        if self.layer.transposed:
            rows, outputs, inputs = weight.T, self.shard.cols, slice(*self.shard.rows)
        for span in _spans(rows):
            chunk = rows[span].to(torch.float64 if ops.has_float64(base.device) else torch.float32)
            own = slice(outputs[0] + span.start, outputs[0] + span.start + len(chunk))
            for start in self.starts.values():
                if start.up is not None and start.down is not None:
                    chunk.add_(_product(start.up[own].to(chunk), start.down[:, inputs].to(chunk)).mul_(start.scaling))
                if start.scale is not None and _is_scaled(start):
                    chunk.mul_(start.scale[own].to(chunk)[:, None])
            rows[span] = chunk
        return weight


def _spans(matrix: Tensor) -> Iterator[slice]:
    limit = _CPU_ELEMENTS if matrix.device.type == "cpu" else _GPU_ELEMENTS
    step = max(1, limit // max(1, matrix.shape[1]))
    for first in range(0, matrix.shape[0], step):
        yield slice(first, first + step)


def _product(up: Tensor, down: Tensor) -> Tensor:
    """Return B A, summed in the order of r: libraries of matrix products differ in theirs."""
    product = torch.zeros((up.shape[0], down.shape[1]), dtype=up.dtype, device=up.device)
    for column, row in zip(up.T, down, strict=True):
        product += column[:, None] * row
    return product


def start_layer(layer: AdaptedLayer, starts: Mapping[str, AdapterStart]) -> LocalWeight:
    """Return the weight that a layer computes with where its adapters are at ``starts``; its base where that is it."""
    base = layer.base
    if not make_another_weight(starts):
        return base
    return StartedWeight(base.parameter, base.shape, base.shard, layer=layer, starts=starts)
