"""Whether a module still shows the parameters that it showed before, found out without naming them anew."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import nn


class ModuleSnapshot:
    """The modules below a model and the parameters that each of them shows. Keeps none of them alive."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modules = [(weakref.ref(m), *_names_and_ids(m._modules), *_names_and_ids(m._parameters)) for m in modules]
        self._parameters = [weakref.ref(p) for m in modules for p in m._parameters.values() if p is not None]

    def is_current(self) -> bool:
        """Whether every module has the same modules and parameters under the same names as then."""
        # In line: this runs for every module at every step.
        for reference, module_names, module_ids, names, ids in self._modules:
            module = reference()
            if module is None:
                return False
            below, shown = module._modules, module._parameters
            if len(below) != len(module_ids) or len(shown) != len(ids):
                return False
            if module_ids and (list(below) != module_names or list(map(id, below.values())) != module_ids):
                return False
            if ids and (list(shown) != names or list(map(id, shown.values())) != ids):
                return False
        # What is gone may have left its address, which is all that is compared above, to another.
        return not [None for reference in self._parameters if reference() is None]


def _names_and_ids(owned: Mapping[str, object]) -> tuple[list[str], list[int]]:
    return list(owned), list(map(id, owned.values()))
