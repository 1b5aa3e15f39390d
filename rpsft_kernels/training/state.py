"""What a resumed run needs beside its anchors, in plain numbers that any framework can store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch

from .reading import Reading

_VERSION = 1


class State(TypedDict):
    """``RotationPenalty.state_dict()``.

    ``ascent`` is a budget's, None before it has begun and without a budget; ``R`` and ``start`` are the numbers of the
    last step that the next one takes into account; ``anchors`` is a digest, "" before there are any, and ``energy``
    sum sigma^2.
    """

    version: int
    mode: str
    step: int
    ascent: list[float] | None
    R: float | None
    start: float | None
    anchors: str
    energy: float


def make_state(**fields: Any) -> State:
    return State(version=_VERSION, **fields)  # type: ignore[typeddict-item,no-any-return]


def read_state(state: object, mode: str) -> State:
    """Check a state that a user gives; returns a copy.

    Raises:
        ValueError: it is none, or of another version or mode.
    """
    if not isinstance(state, Mapping) or not State.__required_keys__ <= set(state):
        raise ValueError(f"state: got {state!r}, expected what RotationPenalty.state_dict() returned")
    if state["version"] != _VERSION:
        raise ValueError(f"state: got version {state['version']!r}, expected {_VERSION}, of this release")
    if state["mode"] != mode:
        raise ValueError(
            f"state: got one of mode {state['mode']!r}, expected mode {mode!r}, as this penalty has: coefficients of "
            "different modes do not compare"
        )
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"state: got step {state['step']!r}, expected an int of at least 0")
    for key in ("R", "start"):
        if state[key] is not None and type(state[key]) is not float:
            raise ValueError(f"state: got {key} {state[key]!r}, expected a float or None")
    ascent = state["ascent"]
    if ascent is not None and (len(ascent) != 3 or any(type(number) is not float for number in ascent)):
        raise ValueError(f"state: got ascent {ascent!r}, expected three floats or None")
    return State(**{key: state[key] for key in State.__required_keys__})  # type: ignore[typeddict-item,no-any-return]


def read_number(value: float) -> Reading:
    """Return a number of the host as one that has arrived."""
    return Reading(torch.tensor(value, dtype=torch.float64, device="cpu"))
