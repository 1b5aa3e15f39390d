"""Where the pretrained weights of a model lie that PEFT has adapted: below adapters, and beside trained copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from ..distributed import LocalWeight, ParameterRef, find_parameters
from ..low_rank import AdaptedLayers, find_adapted

STANDS_STILL = "frozen, and no adapter moves it"


def locate_pretrained(model: nn.Module, names: Iterable[str]) -> dict[str, LocalWeight]:
    """Find the pretrained weights of these names that the model has, as they lie here.

    Raises:
        ValueError: one of them lies in a way that is not known.
    """
    parameters = find_parameters(model)
    found = find_adapted(model, parameters)
    return {name: pretrained_of(name, parameters, found) for name in names if name in parameters}


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
