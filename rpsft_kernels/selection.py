"""Which parameters of a model are anchored, and why the others are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.parameter import is_lazy

from .fingerprint import dtype_name
from .names import named_weights
from .weights import DTYPES

Patterns = str | Sequence[str] | None


@dataclass(frozen=True)
class Selection:
    """Parameters by canonical name: those to anchor, and for each of the others the reason."""

    chosen: dict[str, nn.Parameter]
    skipped: dict[str, str]


def select_weights(model: nn.Module, include: Patterns = None, exclude: Patterns = None) -> Selection:
    """Every 2-D floating point parameter that the globs admit; a tied parameter once, under its first name.

    A glob that matches one name of a tied parameter has matched the parameter; ``exclude`` wins.

    Raises:
        ValueError: ``model`` is not a module, a glob matches no parameter, nothing is left to anchor, or
            a parameter to anchor is sharded or not initialised.
    """
    weights = named_weights(model)
    included = _patterns(include, "include", weights)
    excluded = _patterns(exclude, "exclude", weights)
    names: dict[int, list[str]] = {}
    for name, parameter in weights.items():
        names.setdefault(id(parameter), []).append(name)

    chosen: dict[str, nn.Parameter] = {}
    skipped: dict[str, str] = {}
    for name, parameter in weights.items():
        aliases = names[id(parameter)]
        if name != aliases[0]:
            skipped[name] = f"tied to {aliases[0]}"
            continue
        reason = _excluded(aliases, excluded)
        if reason is None and not _included(aliases, included):
            reason = "matches none of include"
        if reason is None:
            check_whole(name, parameter)
            reason = _unsuitable(parameter)
        if reason is None:
            chosen[name] = parameter
        else:
            skipped[name] = reason
    if not chosen:
        counts = ", ".join(f"{count} {reason}" for reason, count in Counter(skipped.values()).items())
        raise ValueError(
            f"model: got no parameter to anchor ({counts or 'it has none at all'}), expected at least one "
            "2-D floating point parameter: anchors for nothing would regularise nothing; widen include or "
            "narrow exclude"
        )
    return Selection(chosen, skipped)


def check_whole(name: str, parameter: nn.Parameter) -> None:
    """Raise a ValueError under ``name`` if this process holds but a part of ``parameter``, or nothing yet."""
    if is_lazy(parameter):
        raise ValueError(f"{name}: got an uninitialised lazy parameter; run one forward pass first")
    sharded = (
        hasattr(parameter, "placements")  # DTensor
        or (hasattr(parameter, "ds_shape") and parameter.numel() == 0)  # DeepSpeed ZeRO-3, not gathered
        or (hasattr(parameter, "_fsdp_flattened") and parameter.ndim < 2)  # FSDP1
    )
    if sharded:
        raise ValueError(f"{name}: sharded parameters are not supported yet: anchor before sharding")


def _patterns(given: Patterns, argument: str, names: dict[str, nn.Parameter]) -> Sequence[str] | None:
    if given is None:
        return None
    patterns = [given] if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"{argument}: got {given!r}, expected a glob such as '*vision*', a sequence of globs, or None")
    if not patterns and argument == "include":
        raise ValueError("include: got no pattern, expected at least one; pass None to include everything")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            examples = ", ".join(list(names)[:3])
            raise ValueError(
                f"{argument}: pattern {pattern!r} matches none of the model's {len(names)} parameters (such "
                f"as {examples}), expected a glob over full names; correct or remove it"
            )
    return patterns


def _included(aliases: list[str], patterns: Sequence[str] | None) -> bool:
    return patterns is None or any(fnmatchcase(alias, pattern) for alias in aliases for pattern in patterns)


def _excluded(aliases: list[str], patterns: Sequence[str] | None) -> str | None:
    for pattern in patterns or ():
        for alias in aliases:
            if fnmatchcase(alias, pattern):
                through = "" if alias == aliases[0] else f" through its tied name {alias}"
                return f"excluded by {pattern!r}{through}"
    return None


def _unsuitable(parameter: nn.Parameter) -> str | None:
    if parameter.ndim != 2:
        return f"{parameter.ndim}-D"
    if parameter.numel() == 0:
        return "empty"
    if parameter.dtype not in DTYPES:
        floating = parameter.is_floating_point() or parameter.is_complex()
        return f"{'unsupported' if floating else 'integer'} dtype {dtype_name(parameter.dtype)}"
    return None
