"""Checks that parameters which were one when they were anchored still are one, and that no others have become one.

A weight that left its tie has no anchor and would move freely; one with two anchors would be pulled to two places.
"""

from __future__ import annotations

from collections.abc import Mapping

from ..distributed import ParameterRef
from .anchor import Anchor

_REASON = "tied to "


def describe_tie(first: str) -> str:
    """Return why a tied parameter is left out under all names but its ``first``."""
    return _REASON + first


def tied_to(reason: str) -> str | None:
    """Return the name that :func:`describe_tie` was given; None for other reasons."""
    return reason.removeprefix(_REASON) if reason.startswith(_REASON) else None


def check_ties(
    anchors: Mapping[str, Anchor], skipped: Mapping[str, str], parameters: Mapping[str, ParameterRef]
) -> None:
    """Raise a ValueError if parameters of a model are tied otherwise than when they were anchored."""
    problems = find_broken_ties(anchors, skipped, parameters)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"model: {len(problems)} of its parameters are tied otherwise than when they were anchored, expected the "
            "same ties: what has left its tie would move freely, and what was tied since is pulled to two places; "
            "tie or untie them again before the model is wrapped (with FSDP2 tied modules belong into one "
            f"fully_shard), or anchor the pretrained model as it is now (Anchors.from_model):\n  {listed}"
        )


def find_broken_ties(
    anchors: Mapping[str, Anchor], skipped: Mapping[str, str], parameters: Mapping[str, ParameterRef]
) -> list[str]:
    """Describe, in a line each, the parameters of a model that are tied otherwise than when they were anchored.

    Names that the model does not have (those of another pipeline stage) are passed over.
    """
    problems = []
    for name, reason in skipped.items():
        first = reason[len(_REASON) :]
        if not reason.startswith(_REASON) or first not in anchors:
            continue
        if name in parameters and first in parameters and parameters[name].identity != parameters[first].identity:
            problems.append(f"{name}: got a parameter of its own, anchored as one with {first}")
    names: dict[int, str] = {}
    for name in anchors:
        if name in parameters:
            first = names.setdefault(parameters[name].identity, name)
            # One and the same anchor under two names was given by hand.
            if anchors[first] is not anchors[name]:
                problems.append(f"{name}: got one parameter with {first}, anchored as two")
    return problems
