"""Where the pretrained weights of a model lie that PEFT has adapted: below adapters, and beside trained copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..distributed import LocalWeight, ParameterRef, find_parameters
from ..low_rank import AdaptedLayer, AdaptedLayers, find_adapted
from ..low_rank.start import AdapterStart
from ..low_rank.started import MOMENTS, At, StartBytes, count_start_bytes, start_layer, take_starts
from .anchor import Anchor

STANDS_STILL = "frozen, and no adapter moves it"


def locate_pretrained(
    model: nn.Module, names: Iterable[str], anchors: Mapping[str, Anchor] | None = None
) -> dict[str, LocalWeight]:
    """Find the pretrained weights of these names that the model has, as they lie here.

    Args:
        model: the model, adapted or not.
        names: canonical names.
        anchors: where there are some, they know what adapters were at their start.

    Raises:
        ValueError: one of them lies in a way that is not known.
    """
    parameters = find_parameters(model)
    found = find_adapted(model, parameters)
    weights = {name: pretrained_of(name, parameters, found) for name in names if name in parameters}
    for name, anchor in (anchors or {}).items():
        if name in weights and found is not None and name in found.served:
            weights[name] = start_layer(found.served[name], anchor.starts)
    return weights


def start_adapters(
    model: nn.Module, layers: Mapping[str, AdaptedLayer], at: At
) -> tuple[dict[str, dict[str, AdapterStart]], dict[str, LocalWeight]]:
    """Return what the adapters of each layer are to count from, and the weights that they make with their bases.

    Raises:
        ValueError: ``at`` is no such moment; or as :func:`rpsft_kernels.low_rank.started.take_starts`.
    """
    _check_moment(at)
    starts = {name: take_starts(model, layer, at) for name, layer in layers.items()}
    return starts, {name: start_layer(layer, starts[name]) for name, layer in layers.items()}


def count_starts(model: nn.Module, layers: Mapping[str, AdaptedLayer], at: At) -> dict[str, StartBytes]:
    """Return the bytes of what :func:`start_adapters` returns for each layer, with the same errors."""
    _check_moment(at)
    return {name: count_start_bytes(model, layer, at) for name, layer in layers.items()}


def _check_moment(at: object) -> None:
    if at not in MOMENTS:
        raise ValueError(f"at: got {at!r}, expected 'base' or 'now'")


def pretrained_of(name: str, parameters: Mapping[str, ParameterRef], found: AdaptedLayers | None) -> LocalWeight:
    """Return the pretrained weight of a name: not what trains in its place.

    Args:
        name: a canonical name.
        parameters: those of the model.
        found: the adapted layers of the model.
    """
    if found is None:
        return parameters[name].locate(name)
    if name in found.served:
        return found.served[name].base
    original = found.copies.get(name, name)
    return parameters[original].locate(original)


def reason_untouched(name: str, reference: ParameterRef, found: AdaptedLayers | None) -> str | None:
    """Return why a parameter needs no anchor, in a model whose others are adapted; None for all that may move.

    Raises:
        ValueError: adapters move it that are not served.
    """
    if found is None or name in found.served or name in found.copies:
        return None
    if name in found.refused:
        raise ValueError(f"{name}: {found.refused[name]}")
    return None if reference.parameter.requires_grad else STANDS_STILL
