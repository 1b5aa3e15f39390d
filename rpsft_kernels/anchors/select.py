"""Selects the parameters of a model to anchor, and says why each other one is left out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from ..checks import DTYPES, dtype_name
from ..distributed import LocalWeight, ParameterRef, find_parameters
from ..low_rank import AdaptedLayer, AdaptedLayers, find_adapted
from .adapted import pretrained_of, reason_untouched
from .not_weights import ADAPTER, find_non_weights
from .ties import describe_tie

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Selection:
    """Parameters by canonical name: ``chosen`` are to be anchored, ``skipped`` has the reason for each other one.

    ``elements`` counts those of every floating-point parameter of two or more dimensions that the globs admit and that
    may move. ``adapted`` has the layers of those that adapters move.
    """

    chosen: dict[str, LocalWeight]
    skipped: dict[str, str]
    elements: dict[str, int]
    adapted: Mapping[str, AdaptedLayer] = field(default_factory=dict)


def select_weights(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> Selection:
    """Select every 2-D floating point parameter that the globs admit; a tied parameter once, under its first name.

    Parameters that are no weights of their own (``not_weights.py``) are left out.

    A glob that matches one name of a tied parameter has matched the parameter; ``exclude`` wins. Of a model with PEFT's
    adapters the pretrained weights are chosen that the adapters move, and the trainable ones.

    Raises:
        ValueError: ``model`` is not a module, a glob matches no parameter, nothing is left to anchor, or
            a parameter to anchor is not initialised, sharded in a way that is not known, or moved by adapters that
            are not served.
    """
    parameters = find_parameters(model)
    found = find_adapted(model, parameters)
    refused = {} if found is None else {n: why for n, why in found.refused.items() if n not in parameters}
    included = _check_patterns(include, "include", [*parameters, *refused])
    excluded = _check_patterns(exclude, "exclude", [*parameters, *refused])
    for name, why in refused.items():
        # What adapters move of packed values or parts of a parameter has no parameter in the loop below.
        if _reason_excluded([name], excluded) is None and _is_included([name], included):
            raise ValueError(f"{name}: {why}")
    non_weights = find_non_weights(model, parameters)
    names = _tied_names(parameters, found)

    chosen: dict[str, LocalWeight] = {}
    skipped: dict[str, str] = {}
    elements: dict[str, int] = {}
    for name, reference in parameters.items():
        aliases = names[name]
        if name != aliases[0]:
            skipped[name] = describe_tie(aliases[0])
            continue
        reason = _reason_excluded(aliases, excluded)
        if reason is None and not _is_included(aliases, included):
            reason = "matches none of include"
        if reason is None:
            reason = reason_untouched(name, reference, found)
        if reason is None:
            if is_lazy(reference.parameter):
                raise ValueError(f"{name}: got an uninitialised lazy parameter; run one forward pass first")
            if found is not None and name in found.served:
                elements[name] = math.prod(found.served[name].base.shape)
            else:
                copied = found is not None and name in found.copies
                non_weight = None if copied else _first_reason(aliases, non_weights)
                reason = non_weight or _reason_unsuitable(reference)
                if len(reference.shape) > 1 and reference.dtype.is_floating_point:
                    # The parts of adapters move weights that are counted.
                    if found is None or non_weight != ADAPTER:
                        elements[name] = math.prod(reference.shape)
        if reason is None:
            chosen[name] = pretrained_of(name, parameters, found)
        else:
            skipped[name] = reason
    if not chosen:
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(skipped.values()).items())
        raise ValueError(
            f"model: got no parameter to anchor ({counts or 'it has none at all'}), expected at least one "
            "2-D floating point parameter: anchors for nothing would regularise nothing; widen include or "
            "narrow exclude"
        )
    served = {} if found is None else {name: layer for name, layer in found.served.items() if name in chosen}
    return Selection(chosen, skipped, elements, served)


def _tied_names(parameters: Mapping[str, ParameterRef], found: AdaptedLayers | None) -> dict[str, list[str]]:
    """Return for each name all names of the same weight, the first being that which gets the anchor.

    That is one with adapters, where there is one. A weight with adapters of its own under two names is two; one layer
    with its adapters under two names is one.
    """
    by_identity: dict[int, list[str]] = {}
    for name, reference in parameters.items():
        by_identity.setdefault(reference.identity, []).append(name)
    served = found.served if found is not None else {}
    names: dict[str, list[str]] = {}
    for aliases in by_identity.values():
        layers: dict[tuple[int, ...], list[str]] = {}
        for name in aliases:
            if name in served:
                layers.setdefault(served[name].identity, []).append(name)
        others = [name for name in aliases if name not in served]
        adapted = list(layers.values())
        for i, alike in enumerate(adapted):
            names.update({name: [*alike, *(others if i == 0 else [])] for name in alike})
        names.update({name: [*(adapted[0][:1] if adapted else []), *others] for name in others})
    return names


def _check_patterns(given: Patterns, argument: str, names: Sequence[str]) -> Sequence[str] | None:
    if given is None:
        return None
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{argument}: got {given!r}, expected a glob such as '*vision*', a sequence of globs, or None")
    if not patterns and argument == "include":
        raise ValueError("include: got no pattern, expected at least one; pass None to include everything")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join(names[:3])
            raise ValueError(
                f"{argument}: pattern {pattern!r} matches none of the model's {len(names)} parameters (such "
                f"as {examples}), expected a glob over full names; correct or remove it"
            )
    return patterns


def _is_included(aliases: list[str], patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(alias, pattern) for alias in aliases for pattern in patterns)


def _reason_excluded(aliases: list[str], patterns: Sequence[str] | None) -> str | None:
    for pattern in patterns or ():
        for alias in aliases:
            if fnmatchcase(alias, pattern):
                through = "" if alias == aliases[0] else f" through its tied name {alias}"
                return f"excluded by {pattern!r}{through}"
    return None


def _first_reason(aliases: list[str], reasons: Mapping[str, str]) -> str | None:
    return next((reasons[alias] for alias in aliases if alias in reasons), None)


def _reason_unsuitable(reference: ParameterRef) -> str | None:
    if reference.parameter.is_nested:
        return "nested tensor"
    if len(reference.shape) != 2:
        return f"{len(reference.shape)}-D"
    if math.prod(reference.shape) == 0:
        return "empty"
    if reference.dtype not in DTYPES:
        floating = reference.dtype.is_floating_point or reference.dtype.is_complex
        return f"{'unsupported' if floating else 'integer'} dtype {dtype_name(reference.dtype)}"
    return None
