"""Checks that a module still shows the parameters that it showed before, without naming them anew."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..private_names import modules_of, parameters_of
from .dtensor import gathered_by_fsdp2


class ModuleSnapshot:
    """The modules of a model, the parameters that each of them shows, and the places of some of these.

    It keeps none of them alive. It has not even weak references to parameters: torch cannot swap a tensor that has
    one, which is how ``model.to`` converts DTensors. A parameter at the address of one that is gone is thus taken for
    that one: the caller compares every property that it relies on.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[Tensor]) -> None:
        modules = list(model.modules())
        self._model = weakref.ref(model)
        self._shown = [
            (weakref.ref(m), *_names_and_ids(modules_of(m)), *_names_and_ids(parameters_of(m))) for m in modules
        ]
        places = {id(p): (i, name) for i, m in enumerate(modules) for name, p in parameters_of(m).items()}
        # Where FSDP2 shows a whole parameter now, the sharded one has no place in a module.
        self._places = [places.get(id(parameter), (-1, "")) for parameter in parameters]
        self._ids = list(map(id, parameters))
        self._gathered = any(i < 0 for i, _ in self._places)

    def find(self) -> list[Tensor] | None:
        """Return the parameters; None unless every module has the same modules and parameters under the same names."""
        shown_by_module = []
        # This is written in line, because it runs for every module at every step.
        for reference, module_names, module_ids, names, ids in self._shown:
            module = reference()
            if module is None:
                return None
            below, shown = modules_of(module), parameters_of(module)
            if len(below) != len(module_ids) or len(shown) != len(ids):
                return None
            if module_ids and (list(below.keys()) != module_names or list(map(id, below.values())) != module_ids):
                return None
            if ids and (list(shown.keys()) != names or list(map(id, shown.values())) != ids):
                return None
            shown_by_module.append(shown)
        sharded_by_id: dict[int, Tensor] = {}
        if self._gathered:
            model = self._model()
            assert model is not None
            sharded_by_id = {id(sharded): sharded for _, sharded in gathered_by_fsdp2(model)}
        present = []
        for (i, name), number in zip(self._places, self._ids, strict=True):
            parameter = sharded_by_id.get(number) if i < 0 else shown_by_module[i][name]
            if parameter is None:
                return None
            present.append(parameter)
        return present


def _names_and_ids(owned: Mapping[str, object]) -> tuple[list[str], list[int]]:
    return list(owned.keys()), list(map(id, owned.values()))
