"""Whether anchors that were made before are those that a penalty's arguments ask for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..anchors.collection import Anchors
from ..anchors.select import select_weights
from ..checks import dtype_name
from ..distributed import find_parameters
from ..evaluation.caller import level_of_caller
from .settings import Settings

# Energies are sums of float32 numbers or better.
_ROUNDING = 1e-4


def check_asked(anchors: Anchors, settings: Settings, model: nn.Module) -> None:
    """Compare anchors that were given or loaded with the arguments that would have made them.

    Without a rank nothing is asked for but what is said: they are taken as they are. The weights of given anchors are
    not compared, because a mapping of anchors may be of some weights on purpose.

    Warns:
        UserWarning: a share of energy is asked for, and the anchors do not say which one they were made for.

    Raises:
        ValueError: they are of another rank, share, subspace, form, dtype or of other weights.
    """
    where = "anchors" if settings.path is None else f"path: at {os.fspath(settings.path)!r}"
    way_out = "leave rank and the other options of anchors out to take these as they are, or anchor the pretrained "
    way_out += "model anew" + ("" if settings.path is None else " (another path)")
    for argument, asked, found in _differences(anchors, settings, model):
        raise ValueError(f"{where}: got anchors {found}, expected {argument}={asked!r}, as asked for; {way_out}")
    if isinstance(settings.rank, float) and all(anchor.share is None for anchor in anchors.values()):
        warnings.warn(
            f"{where}: got anchors that do not say for which share of energy they were made (a number of directions, "
            f"or an earlier version of this package), expected rank={settings.rank}: they hold at least this share of "
            "each weight, and may hold more; anchor the pretrained model anew for the smallest ranks",
            UserWarning,
            stacklevel=level_of_caller(),
        )


def _differences(anchors: Anchors, settings: Settings, model: nn.Module) -> Iterator[tuple[str, object, str]]:
    """Yield (argument, what it asks for, what the anchors are) of each that differs."""
    rank = settings.rank
    for name, anchor in anchors.items():
        if rank is not None and anchor.random_seed is not None:
            yield "rank", rank, f"of random subspaces (seed {anchor.random_seed}), a control, not of singular ones"
        if isinstance(rank, float):
            if anchor.share is not None and anchor.share != rank:
                yield "rank", rank, f"for a share of energy of {anchor.share}"
            if anchor.energy < rank - _ROUNDING:
                yield "rank", rank, f"of rank {anchor.rank} with a share of energy of {anchor.energy:.4f} ({name})"
        # A weight that is smaller than k has a full anchor.
        elif rank is not None and anchor.rank != min(rank, *anchor.shape):
            yield "rank", rank, f"of rank {anchor.rank} ({name})"
        if settings.keep_base is not None and anchor.form == ("block" if settings.keep_base else "base"):
            yield "keep_base", settings.keep_base, f"in {anchor.form} form ({name})"
        if anchor.left is not None and anchor.left.dtype != settings.basis_dtype:
            # The default is no wish where nothing else is asked for.
            if rank is not None or settings.basis_dtype != torch.bfloat16:
                yield "basis_dtype", settings.basis_dtype, f"with bases in {dtype_name(anchor.left.dtype)} ({name})"
    if settings.anchors is None and (rank, settings.include, settings.exclude) != (None, None, None):
        yield from _other_weights(anchors, settings, model)


def _other_weights(anchors: Anchors, settings: Settings, model: nn.Module) -> Iterator[tuple[str, object, str]]:
    selection = select_weights(model, settings.include, settings.exclude)
    globs = {name: reason for name, reason in selection.skipped.items() if name in anchors}
    for argument, start in (("exclude", "excluded"), ("include", "matches none")):
        beyond = [name for name, reason in globs.items() if reason.startswith(start)]
        if beyond:
            yield argument, getattr(settings, argument), f"of {_list(beyond)} too"
    # A tied weight with an adapter is chosen by the name that has it, and was anchored by its first.
    parameters = find_parameters(model)
    anchored = {parameters[name].identity for name in anchors if name in parameters}
    missing = [n for n in selection.chosen if n not in anchors and parameters[n].identity not in anchored]
    if missing:
        # Anchors may be of more weights than an adapted model moves, not of fewer.
        argument = "include" if settings.include is not None or settings.exclude is None else "exclude"
        yield argument, getattr(settings, argument), f"without {_list(missing)}"


def _list(names: Sequence[str]) -> str:
    return f"{len(names)} weights ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
