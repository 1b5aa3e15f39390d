"""The rotation penalty in the Trainer of transformers and in its subclasses, TRL's among them.

    trainer = penalised(SFTTrainer)(model, args=..., rotation=rk.RotationPenalty(64))

adds the penalty after the last backward pass of a step, and before clipping. :class:`RotationPenaltyCallback` does
without a subclass: weights stand still within a step, so that the penalty may as well come first. Both write R into the
logs and the penalty's state into checkpoints.
"""

from __future__ import annotations

import inspect
import os
import warnings
import weakref
from collections.abc import Callable
from functools import cache
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..training import attach as attach_to_optimizer
from .arguments import RotationArguments as RotationArguments
from .arguments import from_arguments as from_arguments
from .checks import check_penalty, warn_of_second_training
from .deepspeed import check_mode, penalise_backward, replace
from .replicas import check_replicas
from .scaled import read_scale, was_skipped

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import CallbackHandler, ExportableState
    from transformers.training_args import ParallelMode
except ImportError as error:
    raise ImportError(
        "rpsft_kernels.integrations.transformers needs the Trainer of transformers 5: pip install 'transformers[torch]'"
    ) from error

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..training import RotationPenalty

# Optimizers that step within the backward pass; gradients are gone when it ends.
_WITHIN_BACKWARD = ("lomo", "adalomo", "layerwise")


class RotationPenaltyCallback(TrainerCallback, ExportableState):
    """Adds the penalty's gradient first thing in a step, or acts after it in the other modes.

    In one process, under DDP and FSDP2. The other modes are hooks of the optimizer. What a callback cannot reach
    (DeepSpeed's engine, FSDP1's flat gradients, the task's gradients before they are clipped) is refused with the way
    out: :func:`penalised`.

    Args:
        penalty: a ``RotationPenalty``. It is anchored when the trainer is made, or, if its model is still to be
            sharded, when training begins.
    """

    def __init__(self, penalty: RotationPenalty | None = None) -> None:
        if penalty is not None:
            check_penalty(penalty, "penalty")
        # A trainer with restore_callback_states_from_checkpoint makes callbacks anew, and knows no penalty.
        self.penalty = penalty
        # Set by trainers that add the gradients themselves.
        self.trainer_adds = False
        self._unstepped = False
        # The penalty's, when the optimizer stepped the last time.
        self._step = 0
        self._hook: RemovableHandle | None = None
        # Of the trainer's constructor, whose weights are W0.
        self._anchored: weakref.ref[nn.Module] | None = None

    @property
    def _own(self) -> RotationPenalty:
        if self.penalty is None:
            raise ValueError(
                "RotationPenaltyCallback: got no penalty, expected RotationPenaltyCallback(penalty). Where "
                "restore_callback_states_from_checkpoint has made it anew, leave that off: the penalty's state is "
                "restored in any case"
            )
        return self.penalty

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        self._check(args, model)
        # Before a checkpoint is loaded into it.
        if not _is_sharded_later(args):
            self.anchor(model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        # Training may begin otherwise than the trainer was made.
        self._check(args, model)
        self._detach()
        self._unstepped = False
        if state.global_step:
            self._resume(state)
        elif self._own.step:
            warn_of_second_training(self._own)
        else:
            self._check_same(model)
        self._own.anchor(model)
        check_replicas(self._own)
        self._step = self._own.step
        if self._own.mode != "gradient" and not _steps_within_backward(args):
            self._hook = attach_to_optimizer(optimizer, self._own, model)
        _move_to_front(self, inspect.currentframe())

    def _check(self, args: TrainingArguments, model: nn.Module) -> None:
        _check_arguments(args, self._own)
        if not self.trainer_adds:
            _check_reach(args, model, self._own)

    def anchor(self, model: nn.Module) -> None:
        """Anchor the penalty when a trainer is made, by its model unless there are anchors."""
        taken = self._own.anchors is None
        self._own.anchor(model)
        if taken:
            self._anchored = weakref.ref(model)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_hook": None, "_anchored": None}

    def _check_same(self, model: nn.Module) -> None:
        """Raise a ValueError if training begins with a model of other weights than the trainer was made with."""
        made = self._anchored
        if made is None or made() is model or self._own.anchors is None:
            return
        try:
            self._own.anchors.verify(model)
        except ValueError as error:
            raise ValueError(
                "model_init: got other weights when training begins than when the trainer was made, expected the same: "
                f"R would not begin at 0. Load the pretrained weights in it, and seed what is random: {error}"
            ) from error

    def _resume(self, state: TrainerState) -> None:
        penalty = self._own
        stored = state.stateful_callbacks.get(type(self).__name__)
        if penalty.anchors is None and stored is None:
            raise ValueError(
                "RotationPenaltyCallback: got a model that a checkpoint has been loaded into, and no anchors: R would "
                "start again at 0. Give the callback to the trainer's constructor; or use penalised(...) of "
                "rpsft_kernels.integrations.transformers; or keep the anchors in a file: RotationPenalty(path=...)"
            )
        if isinstance(stored, list):
            raise ValueError(f"checkpoint: got the states of {len(stored)} rotation penalties, expected one")
        if stored is None:
            warnings.warn(
                f"the checkpoint of step {state.global_step} has no state of a rotation penalty: its own steps, and a "
                "budget's coefficient, start anew",
                stacklevel=2,
            )
            # Trainer saves into places that it found in the checkpoint.
            state.stateful_callbacks[type(self).__name__] = self.state()
        else:
            penalty.load_state_dict(stored["attributes"]["state_of_penalty"])

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        # An epoch that ends within an accumulation leaves its gradients, the penalty's with them, to the next one.
        if self._own.mode != "gradient" or self.trainer_adds or self._unstepped:
            return
        self._own.add_gradients_(model, read_scale(getattr(optimizer, "scaler", None)))
        self._unstepped = True

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        self._unstepped = False
        if self._own.mode == "gradient":
            if self._own.step == self._step:
                raise ValueError(
                    "training_step: got a step of the optimizer without the penalty, expected RotationPenaltyMixin's, "
                    "which adds it: a method of one's own calls super().training_step(...); or put it into a class "
                    "below: penalised(MyTrainer)"
                )
            if was_skipped(optimizer, self._own):
                self._own.take_back_step()
            # It is settled: a scale that falls later tells of another optimizer's step.
            self._own.scale = None
            self._step = self._own.step
        # Where the backward pass has stepped, and no optimizer of torch.
        if self._own.mode != "gradient" and self._hook is None:
            self._own.after_step_(model, 0.0)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        # Not evaluations, nor the summary of a run.
        if logs is not None and "loss" in logs:
            metrics = self._own.metrics()
            logs.update(metrics)
            # The trainer has copied the logs by now.
            state.log_history[-1].update(metrics)

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"state_of_penalty": self._own.state_dict()}}


class RotationPenaltyMixin:
    """A Trainer with the rotation penalty: ``class MyTrainer(RotationPenaltyMixin, Trainer)``.

    Args:
        rotation: a ``RotationPenalty``; the others are the Trainer's.
    """

    rotation: RotationPenalty

    def __init__(self, *args: Any, rotation: RotationPenalty, **options: Any) -> None:
        super().__init__(*args, **options)
        self.take_penalty(rotation)

    def take_penalty(self, penalty: RotationPenalty) -> None:
        check_penalty(penalty, "rotation")
        trainer: Any = self
        if any(isinstance(c, RotationPenaltyCallback) for c in trainer.callback_handler.callbacks):
            raise ValueError(
                "rotation: got a RotationPenaltyCallback beside it, expected one of the two: R would count twice"
            )
        if trainer.is_deepspeed_enabled:
            check_mode(penalty)
        if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
            raise ValueError("fsdp_config: got FSDP1, expected FSDP2, the default: fsdp_config={'version': 2}")
        _check_arguments(trainer.args, penalty)
        # Wrapping shards weights, or makes those of all ranks equal: anchors are made after it. DeepSpeed loads
        # checkpoints behind the trainer's back, so that they come first there.
        callback = RotationPenaltyCallback(penalty)
        callback.trainer_adds = True
        if trainer.is_deepspeed_enabled:
            penalty.anchor(trainer.model)
        elif trainer.args.world_size == 1 and not trainer.is_fsdp_enabled:
            callback.anchor(trainer.model)
        self.rotation = penalty
        # Before those that report.
        trainer.callback_handler.callbacks.insert(0, callback)

    def training_step(self, model: nn.Module, *args: Any, **options: Any) -> Tensor:
        trainer: Any = self
        step: Callable[..., Tensor] = super().training_step  # type: ignore[misc]
        if self.rotation.mode != "gradient" or not trainer.accelerator.sync_gradients:
            return step(model, *args, **options)
        if trainer.is_deepspeed_enabled:
            # Trainer keeps the engine from dividing the loss.
            backward = penalise_backward(trainer.accelerator.backward, self.rotation, trainer.model_wrapped)
            with replace(trainer.accelerator, "backward", backward):
                return step(model, *args, **options)
        loss = step(model, *args, **options)
        # Not the model that DDP wraps: it has averaged the gradients by now, and every rank adds the whole penalty.
        self.rotation.add_gradients_(trainer.model, read_scale(trainer.accelerator.scaler))
        return loss

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # A model that is sharded by now has its pretrained weights up to here.
        self.rotation.anchor(self.model if model is None else model)  # type: ignore[attr-defined]
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


@cache
def penalised(trainer: type) -> type:
    """Return ``trainer``, a subclass of Trainer, with one more argument: ``rotation``, a ``RotationPenalty``."""
    if not (isinstance(trainer, type) and issubclass(trainer, Trainer)):
        raise ValueError(
            f"trainer: got {trainer!r}, expected Trainer or a subclass of it; for a trainer made: attach(it, penalty)"
        )
    if issubclass(trainer, RotationPenaltyMixin):
        return trainer
    names = {"__doc__": trainer.__doc__, "__module__": trainer.__module__}
    return type(f"Penalised{trainer.__name__}", (RotationPenaltyMixin, trainer), names)


def attach(trainer: Trainer, penalty: RotationPenalty) -> None:
    """Give a trainer that was made already the penalty: it becomes one of :func:`penalised` of its class."""
    if isinstance(trainer, RotationPenaltyMixin):
        raise ValueError("trainer: got one that has a rotation penalty, expected one without: R would count twice")
    plain = trainer.__class__
    trainer.__class__ = penalised(plain)
    try:
        trainer.take_penalty(penalty)
    except BaseException:
        trainer.__class__ = plain
        raise


def _check_arguments(args: TrainingArguments, penalty: RotationPenalty) -> None:
    if penalty.mode != "project" and _steps_within_backward(args):
        raise ValueError(
            f"optim: got {_name_of(args)!r}, which steps within the backward pass, expected one that steps after "
            "it; or RotationPenalty(mode='project', budget=...)"
        )
    if args.parallel_mode in (ParallelMode.TPU, ParallelMode.SAGEMAKER_MODEL_PARALLEL):
        raise ValueError(
            f"parallel_mode: got {args.parallel_mode.value}, expected one process, DDP, FSDP or DeepSpeed: the penalty "
            "does not know where gradients lie there"
        )


def _name_of(args: TrainingArguments) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _steps_within_backward(args: TrainingArguments) -> bool:
    return any(name in _name_of(args) for name in _WITHIN_BACKWARD)


def _check_reach(args: TrainingArguments, model: nn.Module, penalty: RotationPenalty) -> None:
    """Raise a ValueError where a callback does not get to the gradients."""
    instead = "rpsft_kernels.integrations.transformers.penalised(Trainer)(..., rotation=penalty)"
    if penalty.needs_task_gradient:
        raise ValueError(
            "budget: got one with a callback, which sees the task's gradient only once it is clipped, expected "
            f"{instead}; or mode='project'"
        )
    way_out = f"expected one process, DDP or FSDP2; use {instead} in place of the callback"
    if args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(f"RotationPenaltyCallback: got DeepSpeed, {way_out}")
    if isinstance(model, FullyShardedDataParallel):
        raise ValueError(f"RotationPenaltyCallback: got FSDP1, {way_out} (fsdp_config={{'version': 2}})")


def _is_sharded_later(args: TrainingArguments) -> bool:
    return bool(args.fsdp) or _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true")


def _move_to_front(callback: RotationPenaltyCallback, frame: FrameType | None) -> None:
    """Put the callback before those that report, so that what it adds to the logs gets reported.

    A callback is told everything but the handler which calls it, and the constructor of Trainer puts reporters first.
    """
    handler = None if frame is None or frame.f_back is None else frame.f_back.f_locals.get("self")
    if isinstance(handler, CallbackHandler) and callback in handler.callbacks:
        if sum(isinstance(other, RotationPenaltyCallback) for other in handler.callbacks) > 1:
            raise ValueError("callbacks: got several RotationPenaltyCallback, expected one: R would count twice")
        handler.callbacks.remove(callback)
        handler.callbacks.insert(0, callback)
