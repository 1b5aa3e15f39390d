"""Summarises anchors as text."""

from __future__ import annotations

from collections.abc import Mapping

from .anchor import Anchor
from .memory import format_bytes

_SHOWN = 3


def table(anchors: Mapping[str, Anchor], skipped: Mapping[str, str]) -> str:
    """List per form the weights, ranks, bytes and captured energy, then the skipped parameters by reason."""
    lines = [f"{'form':<6}{'weights':>8}{'rank':>11}{'memory':>12}{'energy min':>12}{'mean':>8}"]
    for form in ("base", "block", "full"):
        members = [anchor for anchor in anchors.values() if anchor.form == form]
        if members:
            lines.append(_row(form, members))
    lines.append(_row("total", list(anchors.values())))
    shares = sorted({anchor.share for anchor in anchors.values() if anchor.share is not None})
    if shares:
        asked = ", ".join(map(str, shares))
        lines.append(f"ranks: the smallest that hold a share of {asked} of each weight's energy")
    control = describe_control(anchors)
    if control:
        lines.append(f"subspaces: {control}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in skipped.items():
        by_reason.setdefault(reason, []).append(name)
    lines.append(f"skipped: {len(skipped)} parameters")
    for reason, names in by_reason.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        lines.append(f"  {reason} ({len(names)}): {', '.join(names[:_SHOWN])}{more}")
    return "\n".join(lines)


def describe_control(anchors: Mapping[str, Anchor]) -> str:
    """Say that subspaces are random, with their seeds; empty where all are W0's own."""
    seeds = sorted({anchor.random_seed for anchor in anchors.values() if anchor.random_seed is not None})
    if not seeds:
        return ""
    return f"random, a control for experiments (seed {', '.join(map(str, seeds))})"


def _row(label: str, anchors: list[Anchor]) -> str:
    anchor_ranks = [anchor.rank for anchor in anchors]
    energies = [anchor.energy for anchor in anchors]
    least, most = min(anchor_ranks), max(anchor_ranks)
    spread = str(least) if least == most else f"{least}-{most}"
    memory = format_bytes(sum(anchor.nbytes for anchor in anchors))
    mean = sum(energies) / len(energies)
    return f"{label:<6}{len(anchors):>8}{spread:>11}{memory:>12}{min(energies):>12.4f}{mean:>8.4f}"
