"""Warnings where a penalty is used in a way that is wrong without a word. Each is given once, and waits for nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from ..anchors.collection import Anchors
from ..distributed import LocalWeight, find_parameters
from ..evaluation.caller import level_of_caller
from .record import Record
from .witness import Witnesses

# Steps in a row in which gradients that are zeroed in place look as if a call had come twice: GradScaler skips a few.
_SUSPICIOUS_STEPS = 3
# Records in a row with the same R, if the weights were written, and if they were not.
_STILL = 10
_STILL_UNWRITTEN = 25
# Records in a row in which R rises although its gradient is this many times the task's.
_RISING = 20
_DOMINATES = 3.0
_TOO_STRONG = 1000.0
_COVERAGE = 0.5


class Guards:
    """What a penalty looks out for from call to call."""

    def __init__(self, method: str, has_budget: bool) -> None:
        self._method, self._has_budget = method, has_budget
        self._witnesses = Witnesses()
        self._said: set[str] = set()
        # Whether gradients were new tensors after the last step. Where they are zeroed in place, one that lingers tells
        # nothing.
        self._drops = False
        self._lingering = False
        self._suspicious_steps = 0
        self._has_moved = False
        self._moved = False
        self._last: float | None = None
        self._still = self._still_moved = self._rising = 0

    # -- calls ------------------------------------------------------------------------------------------------

    def refuse_other(self, model: nn.Module) -> None:
        """Raise a ValueError if the last call was of another model, whose anchors and strength these are."""
        if not self.is_of(model) and self._witnesses.are_gone(model):
            raise ValueError(
                f"model: {self._method} got another model than at the last step, expected the one that was anchored, "
                "wrapped or not: R would be measured from other weights. Make a RotationPenalty for each model. Where "
                "its modules were only made anew, go on with RotationPenalty(anchors=penalty.anchors, ...) and "
                "load_state_dict(penalty.state_dict())"
            )

    def forget_model(self) -> None:
        """Let the next call be of any model."""
        self._witnesses.forget()

    def before_call(self, model: nn.Module, weights: Sequence[LocalWeight] | None) -> None:
        """Look whether the optimizer has stepped since the last call; ``weights`` are needed for a new model."""
        if weights is not None:
            self._witnesses.choose(model, weights)
        seen = self._witnesses.look()
        self._moved |= seen.moved
        self._lingering |= seen.lingers
        if self._lingering and (self._drops or seen.drops):
            self._warn_of_second_call()
        if seen.moved:
            self._drops = seen.drops
            self._suspicious_steps = self._suspicious_steps + 1 if self._lingering else 0
            self._lingering = False
            if self._suspicious_steps >= _SUSPICIOUS_STEPS:
                self._warn_of_second_call()

    def before_correction(self, model: nn.Module, weights: Sequence[LocalWeight] | None) -> None:
        """Look whether weights were written since the last correction."""
        if weights is not None:
            self._witnesses.choose(model, weights)
        moved = self._witnesses.look().moved
        self._moved |= moved
        if self._has_moved and not moved:
            self._say(
                "second call",
                f"{self._method}: got a call although no weight was written since the last one, expected one after "
                "each step of the optimizer: a proximal step counts twice where it comes twice, or after a step that "
                "GradScaler skipped. rk.attach(optimizer, penalty, model) calls it after the steps that were made",
            )
        self._has_moved |= moved

    def after_call(self) -> None:
        self._witnesses.note()

    def is_of(self, model: nn.Module) -> bool:
        """Whether its witnesses are of this model."""
        return self._witnesses._model is not None and self._witnesses._model() is model

    def _warn_of_second_call(self) -> None:
        self._say(
            "second call",
            f"{self._method}: got a second call for the same gradients, with no step of the optimizer in between, "
            "expected one per optimizer step: the penalty is in the gradients twice. With gradient accumulation call "
            "it for one micro-batch of the step (where gradients are synchronised), with several optimizers before "
            "one of them",
        )

    # -- numbers ------------------------------------------------------------------------------------------------

    def take(self, record: Record) -> None:
        """Look at the numbers of a step that logs, which have arrived."""
        penalty, ratio = record.found.read()[0], record.grad_ratio()
        moved, self._moved = self._moved, False
        last, self._last = self._last, penalty
        if ratio is not None and ratio > _TOO_STRONG:
            way_out = "A smaller coeff, or a budget, which finds one"
            if self._has_budget:
                way_out = "The budget cannot be held so: a larger one, a smaller learning rate, or mode='project'"
            self._say(
                "strength",
                f"coeff: got {record.coeff:.3g}, with which the penalty's gradient is {ratio:.3g} times the task's "
                f"(2 coeff sqrt(R) / ||g||) at step {record.step}, expected at most a few times: the task is hardly "
                f"learned. {way_out}",
            )
        if last is None:
            return
        self._still = self._still + 1 if penalty == last else 0
        self._still_moved = self._still_moved + int(moved) if penalty == last else 0
        if self._still_moved >= _STILL or self._still >= _STILL_UNWRITTEN:
            written = "although weights were written" if self._still_moved >= _STILL else "and no weight was written"
            self._say(
                "still",
                f"model: got R = {penalty:.6g} in {self._still + 1} steps in a row, {written}, expected it to move as "
                "the weights do: is this the model that the optimizer trains (not a copy), and is the learning rate "
                "large enough for the dtype of its weights?",
            )
        rises = ratio is not None and ratio > _DOMINATES and penalty > last
        self._rising = self._rising + 1 if rises else 0
        if self._rising >= _RISING:
            self._say(
                "lost",
                f"{self._method}: got an R that has risen in {self._rising} steps in a row although its gradient is "
                f"{ratio:.3g} times the task's, expected it to fall: the penalty's gradients are lost (cleared before "
                "the optimizer reads them, or too small beside gradients that a GradScaler has scaled: pass "
                "scale=scaler.get_scale()), or the learning rate is too large for this coeff",
            )

    # -- once -------------------------------------------------------------------------------------------------

    def look_at_coverage(self, anchors: Anchors, model: nn.Module) -> None:
        """Warn if most of what trains has no anchor though nobody left it out."""
        total = covered = 0
        for name, reference in {r.identity: (n, r) for n, r in find_parameters(model).items()}.values():
            if len(reference.shape) < 2 or not reference.parameter.requires_grad:
                continue
            reason = anchors.skipped.get(name, "")
            if reason.startswith(("excluded", "matches none")):
                continue
            total += math.prod(reference.shape)
            covered += math.prod(reference.shape) if name in anchors else 0
        if covered and covered < _COVERAGE * total:
            self._say(
                "coverage",
                f"anchors: got anchors of {covered / total:.1%} of the elements that train in parameters of 2 or more "
                "dimensions, expected most of them: the rest moves freely. anchors.skipped has the reasons",
            )

    def look_at_dtypes(self, weights: Sequence[LocalWeight]) -> None:
        """Warn of weights that hold a correction only as their own dtype rounds it."""
        coarse = {weight.dtype for weight in weights} & {torch.bfloat16, torch.float16}
        if coarse:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in coarse))
            self._say(
                "dtype",
                f"model: got weights in {names}, expected float32 ones (masters) for a mode that corrects them after "
                "the step: a correction is rounded to the weight's own dtype, and one of less than half a unit in its "
                "last place is lost",
            )

    def _say(self, what: str, message: str) -> None:
        if what in self._said:
            return
        self._said.add(what)
        warnings.warn(message, UserWarning, stacklevel=level_of_caller())
