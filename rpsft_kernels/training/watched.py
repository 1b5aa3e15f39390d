"""The weights that R acts on, found again at every step without naming them anew, and without keeping them alive."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

from torch import Tensor, nn

from ..anchors.anchor import Anchor
from ..distributed import LocalWeight, ModuleSnapshot, find_parameters
from ..private_names.peft_names import is_adapted


class WatchedWeights:
    """The anchored weights of a model that train; where adapters train in place of some, all parameters that do.

    Args:
        anchors: the anchors, by the model's parameter names.
    """

    def __init__(self, anchors: Mapping[str, Anchor]) -> None:
        self._anchors = anchors
        self._model: weakref.ref[nn.Module] | None = None
        self._snapshot: ModuleSnapshot | None = None
        self._weights: list[LocalWeight] = []
        self.anchored = True

    def find(self, model: nn.Module) -> list[LocalWeight]:
        """Return the weights as they are now, each once; ``anchored`` tells whether they are those with anchors."""
        if self._snapshot is not None and self._model is not None and self._model() is model:
            parameters = self._snapshot.find()
            if parameters is not None:
                weights = [w.with_parameter(p) for w, p in zip(self._weights, parameters, strict=True)]
                if all(weight.requires_grad for weight in weights):
                    return weights
        return self._find_anew(model)

    def _find_anew(self, model: nn.Module) -> list[LocalWeight]:
        references = find_parameters(model)
        located = [references[name].locate(name) for name in self._anchors if name in references]
        weights = list({weight.identity: weight for weight in located if weight.requires_grad}.values())
        # What adapters move is frozen itself.
        self.anchored = bool(weights) and not (len(weights) < len(located) and is_adapted(model))
        if not self.anchored:
            trained = {r.identity: (n, r) for n, r in references.items() if r.parameter.requires_grad}.values()
            weights = [r.locate(n) for n, r in trained if len(r.shape) == 2]
        lasting = all(weight.lasting for weight in weights)
        self._model = weakref.ref(model)
        self._weights = [weight.without_parameter() for weight in weights]
        self._snapshot = ModuleSnapshot(model, [weight.parameter for weight in weights]) if lasting else None
        return weights


def gradient_of(weight: LocalWeight) -> Tensor | None:
    """Return the gradient that the weight's optimizer reads, whole or as it lies here; None if there is none."""
    # FSDP1 may keep it with a view of its flat parameter.
    return getattr(weight, "_holder", weight.parameter).grad  # type: ignore[no-any-return]
