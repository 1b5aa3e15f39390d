"""A few weights by which a call tells whether the optimizer has stepped since the last one. No device is asked."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..distributed import LocalWeight
from ..private_names import parameters_of

_COUNT = 4


class _Sight(NamedTuple):
    """One weight at one moment: which tensor it was, how often it had been written, and its gradient."""

    identity: int
    version: int
    gradient: Tensor | None


class Seen(NamedTuple):
    """What has happened to the witnesses since the last call.

    Attributes:
        lingers: one that an optimizer trains was not written, and has the same gradient as then.
        moved: one was written.
        drops: one has another gradient, or none: gradients are not zeroed in place.
    """

    lingers: bool
    moved: bool
    drops: bool


class Witnesses:
    """The smallest of the weights in each quarter of the model, so that one optimizer of several is not missed.

    Their modules are held by weak references. Only the gradients, small ones, are kept until the next look.
    """

    def __init__(self) -> None:
        self._model: weakref.ref[nn.Module] | None = None
        self._places: list[tuple[weakref.ref[nn.Module], str]] = []
        self._seen: list[_Sight | None] = []
        # Those that have been written at least once. Nobody may clear the gradients of others.
        self._trained: set[int] = set()

    def are_gone(self, model: nn.Module) -> bool:
        """Whether there were witnesses, and the modules of none are in ``model``: it is another one, not a wrapper."""
        modules = {id(module) for module in model.modules()}
        return bool(self._places) and not any(id(reference()) in modules for reference, _ in self._places)

    def forget(self) -> None:
        """Take witnesses anew at the next call."""
        self._model, self._places, self._seen = None, [], []

    def choose(self, model: nn.Module, weights: Sequence[LocalWeight]) -> None:
        """Take new witnesses among the weights, unless those at hand are of this very model."""
        if self._model is not None and self._model() is model:
            return
        self._model = weakref.ref(model)
        size = -(-len(weights) // _COUNT)
        quarters = [weights[i : i + size] for i in range(0, len(weights), max(size, 1))]
        chosen = {id(min(quarter, key=_elements).parameter) for quarter in quarters}
        self._places = [
            (weakref.ref(module), name)
            for module in model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in chosen
        ]
        self._seen = [None] * len(self._places)
        self._trained = set()

    def look(self) -> Seen:
        """Compare the weights and their gradients with the last :meth:`note`."""
        lingers = moved = drops = False
        for i, (before, now) in enumerate(zip(self._seen, self._look(), strict=True)):
            if before is None or now is None or before.identity != now.identity:
                continue
            same = now.gradient is before.gradient
            drops |= before.gradient is not None and not same
            if before.version != now.version:
                moved = True
                self._trained.add(i)
            elif same and now.gradient is not None and i in self._trained:
                lingers = True
        return Seen(lingers, moved, drops)

    def note(self) -> None:
        """Remember the weights as they are now."""
        self._seen = self._look()

    def _look(self) -> list[_Sight | None]:
        sights: list[_Sight | None] = []
        for reference, name in self._places:
            module = reference()
            parameter = None if module is None else parameters_of(module).get(name)
            sights.append(None if parameter is None else _Sight(id(parameter), parameter._version, parameter.grad))
        return sights


def _elements(weight: LocalWeight) -> int:
    return weight.shape[0] * weight.shape[1]
