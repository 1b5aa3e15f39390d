"""Whether a module still shows the parameters that it showed before, found out without naming them anew."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import nn


class ModuleSnapshot:
    """The modules below a model and the parameters that each of them shows. Keeps none of them alive."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [weakref.ref(module) for module in modules]
        self._shown = [_shown(module) for module in modules]
        self._parameters = [
            weakref.ref(parameter)
            for module in modules
            for parameter in module._parameters.values()
            if parameter is not None
        ]

    def is_current(self) -> bool:
        """Whether every module has the same modules and parameters under the same names as then."""
        for module, shown in zip(self._modules, self._shown, strict=True):
            found = module()
            if found is None or _shown(found) != shown:
                return False
        # What is gone may have left its address, which is all that is compared above, to another.
        return not _any_dead(self._parameters)


def _shown(module: nn.Module) -> tuple[list[str], list[int], list[str], list[int]]:
    modules, parameters = module._modules, module._parameters
    return list(modules), list(map(id, modules.values())), list(parameters), list(map(id, parameters.values()))


def _any_dead(references: Iterable[weakref.ref[nn.Parameter]]) -> bool:
    return any(reference() is None for reference in references)
