"""What one rank alone cannot do, every rank refuses: nobody waits for a rank that has raised."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch.distributed as dist
from torch import nn

from ..distributed import find_parameters, gather_objects, remember_device

# By sets of anchors: a rank that is given no model cannot find the ranks that wait for it there.
_groups_of_anchors: weakref.WeakKeyDictionary[object, dict[str, dist.ProcessGroup]] = weakref.WeakKeyDictionary()


def remember_groups(anchors: object, groups: dict[str, dist.ProcessGroup]) -> None:
    """Remember the groups of the model that a set of anchors was made of or loaded with."""
    if groups:
        _groups_of_anchors[anchors] = groups


def recall_groups(anchors: object) -> dict[str, dist.ProcessGroup]:
    """Return the groups that :func:`remember_groups` was given for these very anchors; none if it was not, or where
    they are gone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return {}
    # Whatever stands in the place of anchors may have no hash.
    return dict(next((groups for known, groups in _groups_of_anchors.items() if known is anchors), {}))


def find_groups(model: nn.Module) -> dict[str, dist.ProcessGroup]:
    """Return the groups of processes that hold the weights of ``model``, by name, in the order of its parameters."""
    groups: dict[str, dist.ProcessGroup] = {}
    for name, reference in find_parameters(model).items():
        try:
            if len(reference.shape) != 2 or not reference.dtype.is_floating_point:
                continue
            weight = reference.locate(name)
        except (RuntimeError, ValueError):
            # A parameter that cannot be anchored (a lazy one, for example), or a refusal that names it later.
            continue
        if weight.group is not None:
            groups.setdefault(weight.group_name, weight.group)
            remember_device(weight.group, weight.device)
    return groups


class Refusals:
    """What ranks cannot do, kept until they have told each other.

    Args:
        what: begins the message of ranks that are told.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._own: Exception | None = None
        self._told = ""

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Keep what is raised within the block, in which no rank talks to another."""
        try:
            yield
        except Exception as error:
            self._own = self._own or error

    def tell(self, group: dist.ProcessGroup) -> bool:
        """Tell every rank of ``group``, which all of them call; returns whether any has something to tell."""
        told = self._told
        if self._own is not None:
            told = f"{self._what}: rank {dist.get_rank()}: {_describe(self._own)}"
        answers = gather_objects(told, group)
        self._told = told or next((answer for answer in answers if answer), "")
        return bool(self._told)

    def tell_all(self, groups: Mapping[str, dist.ProcessGroup]) -> None:
        """Tell every rank of all groups and raise, on each.

        A rank of several groups tells all of them, in the second round at the latest.

        Raises:
            Exception: what this rank itself has kept.
            ValueError: another rank has kept something; the message names it.
        """
        # As many rounds on every rank: how many groups the others are in, a rank does not know.
        for _ in range(2):
            for group in groups.values():
                self.tell(group)
        own, told = self._own, self._told
        # An exception that is being raised may keep this object alive, which would keep it alive.
        self._own = None
        if own is not None:
            raise own
        if told:
            raise ValueError(told)


@contextmanager
def refuse_together(groups: Mapping[str, dist.ProcessGroup], what: str) -> Iterator[None]:
    """Let every rank of ``groups`` raise where one does within the block, in which no rank talks to another.

    Args:
        groups: as :func:`find_groups` returns them.
        what: begins the message of the other ranks.

    Raises:
        ValueError: another rank has raised; the message names it.
    """
    refusals = Refusals(what)
    with refusals.keep():
        yield
    refusals.tell_all(groups)


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, RuntimeError, ValueError)) else f"{type(error).__name__}: {error}"
