"""Finds the line of the user that a warning is about."""

from __future__ import annotations

import inspect

_PACKAGE = __name__.partition(".")[0]


def level_of_caller() -> int:
    """Return the ``stacklevel`` with which a warning of the calling function points outside of this package."""
    level, frame = 0, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, frame = level + 1, frame.f_back
    return level
