"""``RotationPenalty``: configuration and state of the penalty over a training run, free of frameworks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..anchors.collection import Anchors
from ..checks import read_coeff
from ..penalty import accumulate_rotation_grad_, rotation_penalty
from .budget import DualAscent
from .digest import describe_other, digest_anchors
from .reading import Reading
from .record import Record
from .settings import Coefficient, Mode, Settings
from .source import provide_anchors
from .strength import Schedule
from .subspace_energy import measure_energy
from .task_gradient import square_gradients
from .watched import WatchedWeights

_STATE_VERSION = 1


class RotationPenalty:
    """The rotation penalty of a training run: its anchors, its strength at each step, and what it reports.

    Once per optimizer step, in a loop of one's own::

        penalty = rk.RotationPenalty(rank=64, coeff=1.0).anchor(model)
        ...
        loss.backward()                  # as many micro-batches as there are
        penalty.add_gradients_(model)    # before clipping; before the backward passes serves as well
        optimizer.step()

    Args:
        rank: k of the anchors, an int of at least 1; or the share of each weight's energy that its subspaces are to
            hold, a float between 0 and 1. None with ``anchors``, or a ``path`` where there is a file.
        coeff: the paper's lambda, at least 0: a number, or a callable that is given the step, from 0.
        warmup: steps in which the coefficient rises from 0.
        budget: the relative rotation ``sqrt(R / sum sigma^2)`` to stay below, in place of ``coeff``; sigma are the
            singular values that the anchors keep. Its coefficient is found by dual ascent.
        mode: ``"gradient"`` adds ``coeff * dR/dW`` to the gradients, as the paper does.
        include, exclude, keep_base, basis_dtype: as for :meth:`Anchors.from_model`; None leaves its defaults.
        anchors: anchors that were made before.
        path: where anchors are kept: loaded if they are there, else written once the model is anchored.
        log_every: :meth:`metrics` are of every so many steps; in the others nothing is computed for them.
        per_layer: whether they have R of each weight, for one more projection in those steps.

    Attributes:
        mode: as given.
        anchors: None before :meth:`anchor`, unless given.
        step: the number of calls, one per optimizer step.

    Raises:
        ValueError: an argument is invalid, or two exclude each other.

    A call under CUDA graph capture or ``torch.compile`` is refused: a replay would not count the step.
    """

    def __init__(
        self,
        rank: int | float | None = None,
        coeff: Coefficient = 1.0,
        *,
        warmup: int = 0,
        budget: float | None = None,
        mode: Mode = "gradient",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        keep_base: bool | None = None,
        basis_dtype: torch.dtype = torch.bfloat16,
        anchors: Anchors | None = None,
        path: str | os.PathLike[str] | None = None,
        log_every: int = 1,
        per_layer: bool = False,
    ) -> None:
        self._settings = Settings(
            rank=rank,
            coeff=coeff,
            warmup=warmup,
            budget=budget,
            mode=mode,
            include=include,
            exclude=exclude,
            keep_base=keep_base,
            basis_dtype=basis_dtype,
            anchors=anchors,
            path=path,
            log_every=log_every,
            per_layer=per_layer,
        )
        self.anchors: Anchors | None = anchors
        self.step = 0
        self._schedule = Schedule(coeff, warmup)
        self._ascent: DualAscent | None = None
        self._energy = 0.0
        self._digest = ""
        self._watched: WatchedWeights | None = None
        # What a loaded state said before there were anchors.
        self._expected: Mapping[str, Any] | None = None
        # R of the step before, and the squared norm of the task's gradient, on their way to the host.
        self._penalty: Reading | None = None
        self._gradient: Reading | None = None
        self._record: Record | None = None

    @property
    def mode(self) -> Mode:
        return self._settings.mode

    @property
    def needs_task_gradient(self) -> bool:
        """Whether there is a budget whose coefficient begins with the size of the task's gradients."""
        return self._settings.budget is not None and self.mode != "project"

    # -- anchors ------------------------------------------------------------------------------------------------

    def anchor(self, model: nn.Module) -> RotationPenalty:
        """Make, load or take over the anchors, once; returns the penalty itself. Other methods call it by themselves.

        Every rank makes this call. It waits for the device.

        Raises:
            ValueError: as ``Anchors.from_model`` and ``Anchors.load``; or a state was loaded that belongs to other
                anchors.
        """
        if self._watched is not None:
            return self
        anchors = provide_anchors(self._settings, model, resuming=self._expected is not None)
        energy, digest = measure_energy(anchors, model), digest_anchors(anchors)
        if self._expected is not None:
            _refuse_other(self._expected, digest, energy)
        self._expected = None
        self.anchors, self._energy, self._digest = anchors, energy, digest
        self._watched = WatchedWeights(anchors)
        budget = self._settings.budget
        if budget is not None and self.mode != "project":
            started = None if self._ascent is None else self._ascent.coeff
            self._ascent = DualAscent(budget, energy)
            self._ascent.coeff = started
        return self

    # -- one step -----------------------------------------------------------------------------------------------

    def add_gradients_(self, model: nn.Module, scale: float = 1.0) -> Tensor:
        """Add ``coeff * dR/dW`` to the gradients, once per optimizer step and before clipping; returns R, detached.

        W stands still within a step: it may come after the backward passes of the micro-batches or before them all
        (where gradients are cleared after the optimizer's step). See :func:`rpsft_kernels.accumulate_rotation_grad_`.

        Args:
            scale: GradScaler's ``get_scale()``, where the gradients are still scaled; after ``unscale_``, 1.

        Raises:
            ValueError: the mode acts after the step; or as :func:`rpsft_kernels.accumulate_rotation_grad_`. The step
                does not count then.
        """
        self._require("add_gradients_", "gradient")
        factor = _read_scale(scale)
        anchors = self._ready(model)
        coeff = self._coeff()
        gradient = self._measure_gradient(model, factor) if self._wants_gradient() else None
        penalty = accumulate_rotation_grad_(model, anchors, coeff * factor)
        self._count(coeff, penalty, gradient)
        return penalty

    def loss_term(self, model: nn.Module) -> Tensor:
        """Return ``coeff * R``, differentiable, for engines whose gradients cannot be added to (DeepSpeed ZeRO-1/2).

        It is the step's call, in place of :meth:`add_gradients_`: with several micro-batches put it into the loss of
        one of them, times whatever the framework divides that loss by.

        Raises:
            ValueError: the mode acts after the step; or as :func:`rpsft_kernels.rotation_penalty`.
        """
        self._require("loss_term", "gradient")
        anchors = self._ready(model)
        coeff = self._coeff()
        penalty = rotation_penalty(model, anchors)
        self._count(coeff, penalty.detach(), None)
        return coeff * penalty

    def observe_gradients(self, model: nn.Module, scale: float = 1.0) -> None:
        """Take note of the size of the task's gradients, where they are not there yet when :meth:`add_gradients_` is
        called: a budget begins with it, and the metric ``rotation/grad_ratio`` needs it.

        Call it once per step when the gradients are there, after the backward passes. Nothing waits for the device.
        """
        factor = _read_scale(scale)
        self._ready(model)
        if not (self._wants_gradient() or self._wants_gradient(self.step - 1)):
            return
        gradient = self._measure_gradient(model, factor)
        self._gradient = gradient or self._gradient
        if self._record is not None and self._record.gradient is None:
            self._record.gradient = gradient

    # -- what it reports ----------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the latest step that logs; empty before the first. It waits for the device.

        ``rotation/R``; ``rotation/coeff``; ``rotation/loss``, their product; ``rotation/relative``,
        ``sqrt(R / sum sigma^2)``; ``rotation/budget_used``, its share of the budget; ``rotation/grad_ratio``,
        ``2 coeff sqrt(R) / ||g||``, the norm of R's gradient over that of the task's, where the latter is known; and
        ``rotation/layers/<name>``, R of one weight.
        """
        return {} if self._record is None else self._record.metrics(self._energy, self._settings.budget)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the anchors, in plain numbers. It waits for the device."""
        penalty = None if self._penalty is None else self._penalty.read()[0]
        gradient = None if self._gradient is None else self._gradient.read()[0]
        return {
            "version": _STATE_VERSION,
            "mode": self.mode,
            "step": self.step,
            "coeff": None if self._ascent is None else self._ascent.coeff,
            "R": penalty,
            "gradient": gradient,
            "anchors": self._digest,
            "energy": self._energy,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` returned; the next step has the bits that it would have had.

        It may come before the anchors are there: they are compared then, and a model that is loaded with them is not.

        Raises:
            ValueError: it is no such state, or of another mode or other anchors. Nothing has changed then.
        """
        state = _check_state(state, self.mode)
        if self._watched is None:
            self._expected = state if state["anchors"] else None
        elif state["anchors"]:
            _refuse_other(state, self._digest, self._energy)
        self.step = state["step"]
        budget = self._settings.budget
        if budget is not None and self.mode != "project":
            # Its bound is set with the anchors.
            self._ascent = DualAscent(budget, self._energy or 1.0)
            self._ascent.coeff = state["coeff"]
        self._penalty = None if state["R"] is None else Reading(torch.tensor(state["R"], dtype=torch.float64))
        gradient = state["gradient"]
        self._gradient = None if gradient is None else Reading(torch.tensor(gradient, dtype=torch.float64))
        self._record = None

    # -- within ---------------------------------------------------------------------------------------------------

    def _require(self, method: str, *modes: str) -> None:
        if self.mode not in modes:
            other = (
                "after_step_(model, lr), after optimizer.step()" if modes == ("gradient",) else "add_gradients_(model)"
            )
            raise ValueError(f"mode: got {self.mode!r} for {method}, expected {' or '.join(modes)}: call {other}")
        if torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            raise ValueError(
                f"{method}: got a call that is compiled or captured in a CUDA graph, expected a plain one: replays "
                "would not count steps, and would repeat this step's coefficient. Call it outside; or capture "
                "rpsft_kernels.accumulate_rotation_grad_ with a coefficient that stays"
            )

    def _ready(self, model: nn.Module) -> Anchors:
        """Return the anchors where the model is now; what the last step left is settled."""
        self.anchor(model)
        assert self.anchors is not None
        self._settle()
        return self.anchors

    def _settle(self) -> None:
        """Take the last step's numbers into account. A budget waits for them, all else takes them when they arrive."""
        ascent = self._ascent
        if ascent is None:
            return
        penalty, self._penalty = self._penalty, None
        if penalty is not None:
            value = penalty.read()[0]
            if not math.isfinite(value):
                raise ValueError(f"R: got {value} in the step before, expected a finite number: the weights are not")
            ascent.update(value)
        if ascent.coeff is None and self._gradient is not None:
            squared, self._gradient = self._gradient.read()[0], None
            if math.isfinite(squared) and squared > 0:
                ascent.start(math.sqrt(squared))

    def _coeff(self) -> float:
        """Return the coefficient of this step."""
        if self._ascent is None:
            return self._schedule.at(self.step)
        if self._ascent.coeff is not None:
            return self._ascent.coeff
        if self.step >= 2:
            raise ValueError(
                f"budget: got no gradient of the task in {self.step} steps, expected one to begin with: call "
                "add_gradients_ after the backward passes, or observe_gradients(model) there"
            )
        return 0.0

    def _logs(self, step: int) -> bool:
        return step % self._settings.log_every == 0

    def _wants_gradient(self, step: int | None = None) -> bool:
        unstarted = self._ascent is not None and self._ascent.coeff is None
        return unstarted or self._logs(self.step if step is None else step)

    def _measure_gradient(self, model: nn.Module, scale: float) -> Reading | None:
        assert self._watched is not None
        squares = square_gradients(self._watched.find(model))
        return None if squares is None else Reading(squares / (scale * scale))

    def _count(self, coeff: float, penalty: Tensor, gradient: Reading | None) -> None:
        """Take note of a step that was made."""
        reading = Reading(penalty)
        self._penalty = reading
        self._gradient = gradient or self._gradient
        if self._logs(self.step):
            self._record = Record(self.step, coeff, reading, gradient)
        self.step += 1


def _read_scale(scale: object) -> float:
    number = read_coeff(scale)
    if number <= 0:
        raise ValueError(f"scale: got {scale!r}, expected GradScaler's get_scale(), a positive number, or 1")
    return number


def _refuse_other(state: Mapping[str, Any], digest: str, energy: float) -> None:
    difference = describe_other(state, digest, energy)
    if difference is not None:
        raise ValueError(
            f"anchors: got others than the state was saved with ({difference}), expected the same ones: R would be "
            "measured from other weights. Resume with the file that the run began with (path=...)"
        )


def _check_state(state: object, mode: str) -> Mapping[str, Any]:
    fields = {"version", "mode", "step", "coeff", "R", "gradient", "anchors", "energy"}
    if not isinstance(state, Mapping) or not fields <= set(state):
        raise ValueError(f"state: got {state!r}, expected what RotationPenalty.state_dict() returned")
    if state["version"] != _STATE_VERSION:
        raise ValueError(
            f"state: got version {state['version']!r}, expected {_STATE_VERSION}: another release wrote it"
        )
    if state["mode"] != mode:
        raise ValueError(f"state: got one of mode {state['mode']!r}, expected {mode!r}: its coefficient means another")
    if type(state["step"]) is not int or state["step"] < 0:
        raise ValueError(f"state: got step {state['step']!r}, expected an int of at least 0")
    return dict(state)
