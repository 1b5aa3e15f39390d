"""``RotationPenalty``: configuration and state of the penalty over a training run, free of frameworks."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..anchors.collection import Anchors
from ..checks import read_coeff
from ..penalty import accumulate_rotation_grad_, rotation_penalty
from .budget import DualAscent
from .corrections import correct_, penalty_by_weight, project_onto_, proximal_share
from .digest import describe_other, digest_anchors
from .guards import Guards
from .reading import Reading
from .record import Record
from .settings import Coefficient, Mode, Settings
from .source import follow, provide_anchors
from .state import State, make_state, read_number, read_state
from .strength import Schedule
from .subspace_energy import measure_energy
from .task_gradient import square_gradients
from .watched import WatchedWeights

# The smallest coefficient of a budget, as a share of the first, by mode. A gradient at the start is 70 to 1500 times as
# large as what a budget turned out to take; a displacement tells it within ten.
_LEAST = {"gradient": 1e-3, "decoupled": 3e-2}


class RotationPenalty:
    """The rotation penalty of a training run: its anchors, its strength at each step, and what it reports.

    Once per optimizer step, in a loop of one's own::

        penalty = rk.RotationPenalty(rank=64, coeff=1.0).anchor(model)
        ...
        loss.backward()                  # as many micro-batches as there are
        penalty.add_gradients_(model)    # before clipping; before the backward passes serves as well
        optimizer.step()

    Three modes: ``"gradient"`` adds ``coeff * dR/dW`` to the gradients, as the paper does. The others change the
    method: they correct the weights after ``optimizer.step()``, where neither clipping nor an optimizer's moments bend
    what they do (``penalty.after_step_(model, lr)``, or :func:`rpsft_kernels.attach`). ``"decoupled"`` takes the exact
    proximal step of ``coeff * R``, ``W -= s U C V^T`` with ``s = 2 lr coeff / (1 + 2 lr coeff)`` (full anchors:
    ``W -= s (W - W0)``), which is stable for any coeff. ``"project"`` keeps R at its budget: where it is more, all C
    are scaled down by one factor. Weights need to be float32 for these (masters, under mixed precision): others keep a
    correction as their dtype rounds it.

    Args:
        rank: k of the anchors, an int of at least 1; or the share of each weight's energy that its subspaces are to
            hold, a float between 0 and 1. None with ``anchors``, or a ``path`` where there is a file; anchors of
            another k are refused.
        coeff: the paper's lambda, at least 0: a number, or a callable that is given the step, from 0.
        warmup: steps in which the coefficient rises from 0.
        budget: the relative rotation ``sqrt(R / sum sigma^2)`` to stay below, in place of ``coeff``; sigma are the
            singular values that the anchors keep. Its coefficient is found by dual ascent (mode ``"project"`` needs
            none). A run with ``coeff=0.0`` shows in ``rotation/relative`` what there is to hold.
        mode: see above.
        include, exclude, keep_base, basis_dtype: as for :meth:`Anchors.from_model`; None leaves its defaults.
        anchors: anchors that were made before, as they are: no include, exclude or path beside them.
        path: where anchors are kept: loaded if they are there, else written once the model is anchored.
        log_every: :meth:`metrics` are of every so many steps; in the others nothing is computed for them.
        per_layer: whether they have R of each weight, for one more projection in those steps.

    Attributes:
        anchors: None before :meth:`anchor`, unless given.
        step: the number of calls so far, one per optimizer step.
        scale: of the gradients that the last :meth:`add_gradients_` added to; None before it, and once an integration
            has seen whether its step was made.
        attached: the hook that :func:`rpsft_kernels.attach` has made; None without.

    Raises:
        ValueError: an argument is invalid, or two exclude each other.

    Where weights lie over several processes, every rank makes every call, with the model as it is wrapped. Calls under
    CUDA graph capture or ``torch.compile`` are refused: a replay would not count the step.
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
        self.scale: float | None = None
        self.attached: RemovableHandle | None = None
        self._schedule = Schedule(coeff, warmup)
        self._ascent = DualAscent(_LEAST[mode]) if budget is not None and mode != "project" else None
        self._guards = Guards("add_gradients_" if mode == "gradient" else "after_step_", budget is not None)
        # These are set once there are anchors; a state that came before waits for them.
        self._watched: WatchedWeights | None = None
        self._energy, self._digest = 0.0, ""
        self._expected: State | None = None
        # Whether the anchors lie where the weights were at the first step.
        self._followed = False
        # What the next step takes into account: R, and a squared norm for a budget to begin with.
        self._penalty: Reading | None = None
        self._start: Reading | None = None
        # Steps in a row, of this process, in which a budget that has not begun was shown no gradient, or one of 0.
        self._unmeasured = 0
        # A squared norm that was observed before this step's call.
        self._observed: Reading | None = None
        self._record: Record | None = None
        self._unseen: Record | None = None
        # Whether there is a call that can be taken back.
        self._counted = False

    def __repr__(self) -> str:
        rank = self._settings.rank
        strength = f"coeff={self._settings.coeff!r}" if self.budget is None else f"budget={self.budget:g}"
        anchored = "not anchored" if self.anchors is None else repr(self.anchors)
        return f"RotationPenalty(rank={rank}, {strength}, mode={self.mode!r}, step={self.step}; {anchored})"

    @property
    def mode(self) -> Mode:
        return self._settings.mode

    @property
    def budget(self) -> float | None:
        return self._settings.budget

    @property
    def needs_task_gradient(self) -> bool:
        """Whether there is a budget whose coefficient begins with the size of the task's gradients."""
        return self.budget is not None and self.mode == "gradient"

    # -- anchors ------------------------------------------------------------------------------------------------

    def anchor(self, model: nn.Module) -> RotationPenalty:
        """Make, load or take over the anchors, once; returns the penalty itself. Other methods call it by themselves.

        It waits for the device.

        Raises:
            ValueError: as ``Anchors.from_model`` and ``Anchors.load``; or a state was loaded that belongs to other
                anchors.
        """
        if self._watched is not None:
            return self
        if not isinstance(model, nn.Module):
            raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module, the pretrained model")
        anchors = provide_anchors(self._settings, model, resuming=self._expected is not None)
        energy, digest = measure_energy(anchors, model), digest_anchors(anchors)
        if not energy > 0:
            raise ValueError(
                "anchors: got pretrained weights that are 0 in all their subspaces, expected some energy: R has "
                "nothing to be relative to; anchor the model after its weights are loaded"
            )
        if self._expected is not None:
            _refuse_other(self._expected, digest, energy)
            self._expected = None
        self.anchors, self._energy, self._digest = anchors, energy, digest
        self._watched = WatchedWeights(anchors)
        if self._settings.rank is None:
            self._guards.look_at_coverage(anchors, model)
        return self

    # -- one step -----------------------------------------------------------------------------------------------

    def add_gradients_(self, model: nn.Module, scale: float = 1.0) -> Tensor:
        """Add ``coeff * dR/dW`` to the gradients, once per optimizer step and before clipping; returns R, detached.

        W stands still within a step: it may come after the backward passes of the micro-batches or before them all
        (where gradients are cleared after the optimizer's step). See :func:`rpsft_kernels.accumulate_rotation_grad_`.
        A budget waits for the R of the step before, which has long been computed; nothing else waits.

        Args:
            scale: GradScaler's ``get_scale()``, where the gradients are still scaled; after ``unscale_``, 1. One that
                has fallen since the last call tells that GradScaler skipped that step, which does not count then.

        Raises:
            ValueError: the mode acts after the step; or as :func:`rpsft_kernels.accumulate_rotation_grad_`. The step
                does not count then.
        """
        self._require("add_gradients_", "gradient")
        factor = _read_scale(scale)
        self._guards.refuse_other(model)
        if self._counted and self.scale is not None and factor < self.scale:
            self.take_back_step()
        anchors = self.ready(model)
        self._guards.before_call(model, self._witnesses(model))
        coeff = self._coeff()
        gradient = self._observed
        if gradient is None and self._wants_gradient(self.step):
            gradient = self._measure_gradient(model, factor)
        layers = self._measure_layers(model)
        penalty = accumulate_rotation_grad_(model, anchors, coeff * factor)
        reading = Reading(penalty)
        record = Record(self.step, coeff, reading, reading, self._comparable(gradient), *layers)
        self._count(record, gradient)
        self.scale = factor
        return penalty

    def loss_term(self, model: nn.Module) -> Tensor:
        """Return ``coeff * R``, differentiable, for engines whose gradients cannot be added to (DeepSpeed ZeRO-1/2).

        It is the step's call, in place of :meth:`add_gradients_`: with several micro-batches put it into the loss of
        one of them, times whatever the framework divides that loss by.

        Raises:
            ValueError: the mode acts after the step; or as :func:`rpsft_kernels.rotation_penalty`.
        """
        self._require("loss_term", "gradient")
        anchors = self.ready(model)
        coeff = self._coeff()
        layers = self._measure_layers(model)
        penalty = rotation_penalty(model, anchors)
        reading = Reading(penalty)
        record = Record(self.step, coeff, reading, reading, self._comparable(self._observed), *layers)
        self._count(record, self._observed)
        return coeff * penalty

    def take_back_step(self) -> None:
        """Let the last call not count, because the optimizer's step that it was for was skipped, as by GradScaler where
        gradients overflow: a schedule does not go on, and R of the same weights does not count twice for a budget.

        Needed in loops that unscale gradients before they call :meth:`add_gradients_`. The modes after the step are not
        called for steps that are skipped.

        Raises:
            ValueError: there was no call since the last one that was taken back; or the mode acts after the step.
        """
        self._require("take_back_step", "gradient")
        if not self._counted:
            raise ValueError("take_back_step: got no call to take back, expected one since the last step: once each")
        self.step -= 1
        self._counted, self._penalty = False, None

    def observe_gradients(self, model: nn.Module, scale: float = 1.0) -> None:
        """Take note of the size of the task's gradients, where they are not there yet when :meth:`add_gradients_` is
        called: a budget begins with it, and the metric ``rotation/grad_ratio`` needs it.

        Call it once per step when the gradients are there, after the backward passes. Nothing waits for the device. The
        modes after the step need no gradients, and it does nothing.
        """
        factor = _read_scale(scale)
        if self.mode != "gradient" or not (self._wants_gradient(self.step) or self._wants_gradient(self.step - 1)):
            return
        self.anchor(model)
        gradient = self._measure_gradient(model, factor)
        if self._ascent is not None and self._ascent.coeff is None:
            self._start = gradient or self._start
        record = self._record
        if record is not None and record.step == self.step - 1 and record.gradient is None:
            record.gradient = self._comparable(gradient)
        else:
            self._observed = gradient

    def after_step_(self, model: nn.Module, lr: float | Mapping[int, float]) -> Tensor:
        """Correct the weights, once after each step that the optimizer makes; returns the R that is left, detached.

        Frozen weights stay as they are, and keep their part of R. With ``"decoupled"`` nothing waits for a device but a
        budget, for the R of the step before; the R that is left is computed as ``(1 - s)^2`` times that of before,
        which is exact for orthonormal U and V. ``"project"`` waits for R once per step. It leaves R within 1e-3 of the
        budget where it was more: if it was more than 1.1 times as much, R is computed again, because U and V in
        bfloat16 are not quite orthonormal. Where rounding keeps R from the budget (weights in 16 bits, which may lose
        the correction; a budget far below what weights have moved outside of their subspaces), R is measured once more
        and returned as it is. A budget below what frozen weights have moved cannot be met: the others lose all of their
        drift.

        Weights over several processes: shards (DTensor, FSDP1) are corrected where they lie. Of replicas
        (DistributedDataParallel) each rank corrects its share, and sends it to the others: all of them end with the
        same bits.

        Args:
            lr: the learning rate of the step; or one for each anchored weight that trains, by the ``id`` of its
                parameter. ``"project"`` does not read it.

        Raises:
            ValueError: the mode adds gradients; a weight cannot be corrected where it lies (DeepSpeed, a ``main_grad``,
                memory that is shared); every anchored weight is frozen; lr is no number of at least 0; or as
                :func:`rpsft_kernels.rotation_penalty`. No weight has changed, and the step does not count then.
        """
        self._require("after_step_", "decoupled", "project")
        rates = _read_rates(lr)
        self._guards.refuse_other(model)
        anchors = self.ready(model)
        witnesses = self._witnesses(model)
        self._guards.before_correction(model, witnesses)
        layers = self._measure_layers(model)
        if self.mode == "project":
            bound = float(self.budget or 0.0) ** 2 * self._energy
            penalty, before, after = project_onto_(model, anchors, bound)
            kept = penalty.new_tensor(after)
            # They are numbers of the host already.
            found, remains, coeff = read_number(before), read_number(after), None
        else:
            coeff = self._coeff()
            shares = {key: proximal_share(rate, coeff) for key, rate in rates.items()}
            penalty, kept = correct_(model, anchors, shares if isinstance(lr, Mapping) else shares[0])
            found, remains = Reading(penalty), Reading(kept)
        if witnesses is not None:
            self._guards.look_at_dtypes(witnesses)
        start = None
        if self._ascent is not None and self._ascent.coeff is None:
            largest = self._largest_rate(model, rates)
            # What the steps so far have moved, per unit of learning rate, stands for the norm of a gradient.
            start = Reading(penalty / largest**2) if largest > 0 else None
        self._count(Record(self.step, coeff, found, remains, None, *layers), start)
        return kept

    # -- what it reports ----------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, float]:
        """Return the numbers of the latest step that logs; empty before the first. It waits for the device.

        ``rotation/R`` (after a correction, where there is one); ``rotation/relative``, ``sqrt(R / sum sigma^2)``;
        ``rotation/coeff`` and ``rotation/loss``, its product with R (not in mode ``"project"``);
        ``rotation/budget_used``, the relative rotation over the budget; ``rotation/grad_ratio``,
        ``2 coeff sqrt(R) / ||g||``, the norm of R's gradient over that of the task's, where the latter is known (not
        for adapters; if gradients are observed after the penalty's has been added, g has it in it); and
        ``rotation/layers/<name>``, R of each weight before a correction.
        """
        return {} if self._record is None else self._record.metrics(self._energy, self.budget)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the anchors, in plain numbers. It waits for the device."""
        state = make_state(
            mode=self.mode,
            step=self.step,
            ascent=None if self._ascent is None else self._ascent.state(),
            R=None if self._penalty is None else self._penalty.read()[0],
            start=None if self._start is None else self._start.read()[0],
            anchors=self._digest,
            energy=self._energy,
        )
        return dict(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state that :meth:`state_dict` returned; the next step has the bits that it would have had.

        It may come before the anchors are there: they are compared then, and a model that is loaded with them is not
        compared with their W0, because it has been trained.

        Raises:
            ValueError: it is no such state, or of another mode or other anchors. Nothing has changed then.
        """
        given = read_state(state, self.mode)
        if self._watched is None:
            self._expected = given if given["anchors"] else None
        elif given["anchors"]:
            _refuse_other(given, self._digest, self._energy)
        self.step = given["step"]
        if self._ascent is not None:
            self._ascent.restore(given["ascent"])
        self._penalty = None if given["R"] is None else read_number(given["R"])
        self._start = None if given["start"] is None else read_number(given["start"])
        self._record = self._unseen = self._observed = None
        self._unmeasured, self._counted, self.scale = 0, False, None
        self._guards.forget_model()

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy goes on with, of any model with these weights; :meth:`metrics` begin anew.

        Attributes that a subclass or a user has added are among it.
        """
        own = vars(RotationPenalty(1))
        return {
            "added": {name: value for name, value in vars(self).items() if name not in own},
            "settings": {field.name: getattr(self._settings, field.name) for field in fields(self._settings)},
            "anchors": self.anchors,
            "anchored": None if self._watched is None else (self._energy, self._digest),
            "state": self.state_dict(),
            "expected": self._expected,
        }

    def __setstate__(self, given: dict[str, Any]) -> None:
        RotationPenalty.__init__(self, **given["settings"])
        vars(self).update(given["added"])
        self.anchors = given["anchors"]
        if given["anchored"] is not None:
            assert self.anchors is not None
            self._energy, self._digest = given["anchored"]
            self._watched = WatchedWeights(self.anchors)
        self.load_state_dict(given["state"])
        self._expected = given["expected"]

    # -- within ---------------------------------------------------------------------------------------------------

    def _require(self, method: str, *modes: str) -> None:
        if self.mode not in modes:
            other = "after_step_(model, lr)" if modes == ("gradient",) else "add_gradients_(model)"
            raise ValueError(f"mode: got {self.mode!r} for {method}, expected {' or '.join(modes)}: call {other}")
        # Before a GPU is in use nothing is captured, and to ask would start it.
        captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]
        if torch.compiler.is_compiling() or captured:
            raise ValueError(
                f"{method}: got a call that is compiled or captured in a CUDA graph, expected a plain one: replays "
                "would not count steps, and would repeat this step's coefficient. Call it outside; or capture "
                "rpsft_kernels.accumulate_rotation_grad_ with a coefficient that stays"
            )

    def ready(self, model: nn.Module) -> Anchors:
        """Return the anchors, where the weights are; what the last step left is settled."""
        self.anchor(model)
        assert self.anchors is not None
        if not self._followed:
            # Trainers move a model once it has been anchored.
            anchors, self._followed = follow(self.anchors, model), True
            if anchors is not self.anchors:
                self.anchors, self._watched = anchors, WatchedWeights(anchors)
        self._settle()
        return self.anchors

    def _settle(self) -> None:
        """Take the last step's numbers into account. A budget waits for them, all else takes them when they arrive."""
        unseen = self._unseen
        if unseen is not None and (self._ascent is not None or unseen.arrived):
            self._unseen = None
            self._guards.take(unseen)
        if self._ascent is None:
            return
        bound = float(self.budget or 0.0) ** 2 * self._energy
        penalty, self._penalty = self._penalty, None
        if penalty is not None:
            self._ascent.update(penalty.read()[0], bound)
        if self._ascent.coeff is None and self._start is not None:
            squared, self._start = self._start.read()[0], None
            if squared != 0:
                # One that is not finite is waited for: a GradScaler begins with scales that overflow.
                self._unmeasured = 0
            if math.isfinite(squared) and squared > 0:
                self._ascent.start(math.sqrt(squared), bound)

    def _coeff(self) -> float:
        """Return the coefficient of this step."""
        if self._ascent is None:
            return self._schedule.at(self.step)
        if self._ascent.coeff is not None:
            return self._ascent.coeff
        if self._unmeasured >= 2 and self.mode == "gradient":
            raise ValueError(
                f"budget: got no gradient of the task in {self._unmeasured} steps, expected one to begin with: call "
                "add_gradients_ after the backward passes, or observe_gradients(model) there (penalised(Trainer) of "
                "rpsft_kernels.integrations.transformers does); or use mode 'decoupled' or 'project', which need none"
            )
        return 0.0

    def _logs(self, step: int) -> bool:
        return step % self._settings.log_every == 0

    def _wants_gradient(self, step: int) -> bool:
        return self._logs(step) or (self._ascent is not None and self._ascent.coeff is None)

    def _witnesses(self, model: nn.Module) -> list[Any] | None:
        """Return the weights to choose witnesses from, where the model is new."""
        assert self._watched is not None
        return None if self._guards.is_of(model) else self._watched.find(model)

    def _measure_gradient(self, model: nn.Module, scale: float) -> Reading | None:
        assert self._watched is not None
        squares = square_gradients(self._watched.find(model))
        return None if squares is None else Reading(squares / (scale * scale))

    def _largest_rate(self, model: nn.Module, rates: Mapping[int, float]) -> float:
        """Return the largest learning rate of an anchored weight; ``rates`` may be of other parameters too."""
        assert self._watched is not None
        anchored = [rates[key] for key in map(id, (w.parameter for w in self._watched.find(model))) if key in rates]
        return max(anchored or rates.values())

    def _comparable(self, gradient: Reading | None) -> Reading | None:
        """Return a task gradient that R's gradient compares with: not that of adapters, which is one of factors."""
        return gradient if self._watched is not None and self._watched.anchored else None

    def _measure_layers(self, model: nn.Module) -> tuple[list[str], Reading | None]:
        if not self._settings.per_layer or not self._logs(self.step):
            return [], None
        assert self.anchors is not None
        names, penalties = penalty_by_weight(model, self.anchors)
        return names, Reading(penalties)

    def _count(self, record: Record, start: Reading | None) -> None:
        """Take note of a step that was made."""
        self._observed, self._counted, self.scale = None, True, None
        self._guards.after_call()
        if self._ascent is not None:
            self._penalty = record.kept
            if self._ascent.coeff is None:
                self._start = start or self._start
                self._unmeasured += 1
        if self._logs(self.step):
            self._record = self._unseen = record
        self.step += 1


def _read_scale(scale: object) -> float:
    number = read_coeff(scale)
    if number <= 0:
        raise ValueError(f"scale: got {scale!r}, expected GradScaler's get_scale(), a positive number, or 1")
    return number


def _read_rates(lr: float | Mapping[int, float]) -> dict[int, float]:
    """Return learning rates by the id of their parameter, under 0 one of all."""
    rates = {key: _read_rate(rate) for key, rate in (lr.items() if isinstance(lr, Mapping) else [(0, lr)])}
    if not rates:
        raise ValueError("lr: got an empty mapping, expected a learning rate for every anchored weight that trains")
    return rates


def _read_rate(lr: object) -> float:
    """Return a learning rate as a number; a tensor on a GPU is waited for."""
    try:
        rate = math.nan if isinstance(lr, (bool, str)) else float(lr)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        rate = math.nan
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"lr: got {lr!r}, expected the learning rate of the step, a number of at least 0")
    return rate


def _refuse_other(state: State, digest: str, energy: float) -> None:
    difference = describe_other(state, digest, energy)
    if difference is not None:
        raise ValueError(
            f"anchors: got others than the state was saved with ({difference}), expected the same ones: R would be "
            "measured from other weights. Resume with those that the run began with: anchors=rk.Anchors.load(their "
            "file), or a model of the pretrained weights"
        )
