"""A warning where a good part of a model gets no anchor though nobody asked for that."""

from __future__ import annotations

from .select import Selection

# From this share of the elements on.
_SHARE = 0.2
_SHOWN = 5


def describe_left_out(selection: Selection) -> str | None:
    """Describe the parameters that ``selection`` leaves out, the largest first; None where they are a small part.

    Only floating-point parameters of two or more dimensions count, and none that ``include`` or ``exclude`` leaves out.
    Integers (4-bit values in bytes) cannot require grad: they stand still. What adapters move above them is counted.
    """
    total = sum(selection.elements.values())
    left_out = {name: count for name, count in selection.elements.items() if name in selection.skipped}
    share = sum(left_out.values()) / max(total, 1)
    if share < _SHARE:
        return None
    largest = sorted(left_out, key=lambda name: -left_out[name])[:_SHOWN]
    shown = ", ".join(f"{name} ({left_out[name] / total:.1%}, {selection.skipped[name]})" for name in largest)
    more = f" and {len(left_out) - _SHOWN} more" if len(left_out) > _SHOWN else ""
    return (
        f"model: {share:.1%} of the elements of its floating-point parameters of 2 or more dimensions get no anchor, "
        f"and the penalty does not see them move: {shown}{more}; expected 2-D weights: make one parameter of each "
        "matrix, or exclude what is meant to move freely (exclude=...). All are in the attribute skipped of the anchors"
    )
