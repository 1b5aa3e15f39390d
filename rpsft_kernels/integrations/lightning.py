"""The rotation penalty in Lightning: a callback for its Trainer, and a call for Fabric.

    trainer = lightning.Trainer(callbacks=[RotationPenaltyCallback(rk.RotationPenalty(64))], gradient_clip_val=1.0)

The gradient is added in ``on_before_optimizer_step``: after the last backward pass and unscaling, before clipping.
Hooks of the optimizer run earlier, before the ``zero_grad`` of Lightning's closure.
"""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from ..distributed import find_parameters
from ..private_names.torch_names import unscales_within_step
from ..training.attach import has_hooks
from .checks import check_penalty, warn_of_second_training
from .rates import read_rates
from .replicas import check_replicas

try:
    from lightning.fabric import Fabric
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
    from lightning.pytorch.utilities.model_helpers import is_overridden
except ImportError as error:
    raise ImportError("rpsft_kernels.integrations.lightning needs Lightning 2: pip install lightning") from error

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from ..training import RotationPenalty


class RotationPenaltyCallback(Callback):
    """Adds the penalty's gradient before each optimizer step, or acts after it in the other modes.

    On one device, under DDP, and under ModelParallelStrategy (FSDP2, tensor parallel). R is logged every
    ``log_every_n_steps``, and the penalty's state is in the checkpoints. The penalty is anchored when fitting begins:
    from the module's weights before a checkpoint is loaded into them.

    A module with manual optimization calls ``penalty.add_gradients_(self)`` itself, once per step, after
    ``manual_backward`` and before it clips; a step without is refused. Under ``precision="16-mixed"`` its gradients are
    scaled by then, and it passes ``scale=self.trainer.precision_plugin.scaler.get_scale()``.
    """

    def __init__(self, penalty: RotationPenalty) -> None:
        check_penalty(penalty, "penalty")
        self.penalty = penalty
        self._handles: list[RemovableHandle] = []
        # Then the penalty refuses to be anchored by a model that has been trained.
        self._restored = False
        # Of the penalty, when a batch has ended the last time.
        self._step = 0
        # Of the optimizers' steps since; None where there was none.
        self._rates: float | dict[int, float] | None = None
        # Of the penalty, at the last optimizer step.
        self._seen = 0
        # GradScaler's, with which the penalty was added then; None where it was not, and without a scaler.
        self._scale: float | None = None
        # Whether anchored weights have had a step since.
        self._stepped = False
        # Where the callback was made: what other processes train, they keep to themselves.
        self._process = os.getpid()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        strategy = trainer.strategy
        if type(strategy) not in (SingleDeviceStrategy, DDPStrategy, ModelParallelStrategy):
            raise ValueError(
                f"strategy: got {type(strategy).__name__}, expected one device, DDP or ModelParallelStrategy (FSDP2): "
                "what others do with gradients between the backward pass and the step is their own"
            )
        if os.getpid() != self._process and self.penalty.anchors is None and trainer.is_global_zero:
            warnings.warn(
                "strategy: got one that trains in processes which fit makes (ddp_spawn, ddp_fork, ddp_notebook), and a "
                "penalty without anchors, expected penalty.anchor(module) before fit: the anchors end with those "
                "processes, so that a further fit would anchor the trained module, and R begin at 0 again",
                stacklevel=2,
            )
        # Lightning may load a checkpoint next, and tells nobody before it does.
        if not (strategy.restore_checkpoint_after_setup or is_overridden("configure_model", pl_module)):
            # Where the strategy puts it next; subspaces are computed there.
            pl_module.to(strategy.root_device)
            self.penalty.anchor(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded = trainer.ckpt_path is not None and not trainer.strategy.restore_checkpoint_after_setup
        if self.penalty.anchors is None and loaded and not self._restored:
            raise ValueError(
                "ckpt_path: got a checkpoint without the penalty's state for a module that configure_model makes, "
                "expected anchors: R would start again at 0. Keep them in a file: RotationPenalty(path=...)"
            )
        self.penalty.anchor(pl_module)
        check_replicas(self.penalty)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = self._seen = self.penalty.step
        self._rates, self._scale, self._stepped = None, None, False
        if self.penalty.step and trainer.global_step == 0:
            warn_of_second_training(self.penalty)

        def note(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            if self.penalty.mode == "gradient":
                self._refuse_without_penalty(optimizer, pl_module)
                if self._scale is not None and not _was_skipped(optimizer):
                    self._stepped |= _holds_anchored(optimizer, pl_module, self.penalty)
                return
            if _was_skipped(optimizer):
                return
            # Now, before a scheduler changes them.
            self._rates = read_rates([group for each in trainer.optimizers for group in each.param_groups])

        # Lightning takes any object with the methods of an optimizer; those without hooks are not watched.
        hooked = [optimizer for optimizer in trainer.optimizers if has_hooks(optimizer)]
        if self.penalty.mode != "gradient" and len(hooked) < len(trainer.optimizers):
            raise ValueError(
                f"optimizer: got one without torch's hooks after its step in mode {self.penalty.mode!r}, expected a "
                "torch.optim.Optimizer; or mode='gradient'"
            )
        self._handles = [optimizer.register_step_post_hook(note) for optimizer in hooked]

    def _refuse_without_penalty(self, optimizer: Optimizer, pl_module: LightningModule) -> None:
        """Raise a ValueError if anchored weights get a step, and the penalty was not added since the last batch."""
        if self.penalty.step != self._step or _has_no_gradient(optimizer):
            return
        if not _holds_anchored(optimizer, pl_module, self.penalty):
            return
        way = "penalty.add_gradients_(self) before it: once per step, after manual_backward and before clipping"
        if pl_module.automatic_optimization:
            way = "one that goes through Lightning: optimizer.step(closure=optimizer_closure) in optimizer_step"
        raise ValueError(
            f"{type(pl_module).__name__}: got an optimizer step of its own "
            f"(automatic_optimization={pl_module.automatic_optimization}) without the penalty, expected {way}"
        )

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.penalty.mode != "gradient":
            return
        if _has_no_gradient(optimizer):
            # The training step returned None, so that there is no step to be made.
            return
        scale = _read_scale(trainer.precision_plugin)
        if pl_module.automatic_optimization:
            # Lightning has unscaled them, but for optimizers that do it themselves.
            still = scale if unscales_within_step(optimizer) else None
            self.penalty.add_gradients_(pl_module, 1.0 if still is None else still)
        elif self.penalty.step == self._step:
            self._refuse_without_penalty(optimizer, pl_module)
        elif self.penalty.step != self._seen and scale is not None and self.penalty.scale not in (None, scale):
            raise ValueError(
                f"scale: got {self.penalty.scale:g} in {type(pl_module).__name__}'s call of penalty.add_gradients_, "
                f"expected {scale:g}, by which GradScaler has scaled the gradients there: add_gradients_(self, "
                "scale=self.trainer.precision_plugin.scaler.get_scale())"
            )
        if self.penalty.step != self._seen:
            # The first optimizer's of several: the scaler may change it after each.
            self._seen, self._scale, self._stepped = self.penalty.step, scale, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Once, however many optimizers have stepped; a step that a scaler has skipped is none.
        if self._rates is not None:
            self.penalty.after_step_(pl_module, self._rates)
            self._rates = None
        self._take_back_if_skipped(trainer)
        self._seen = self.penalty.step
        if self.penalty.step == self._step:
            return
        self._step = self.penalty.step
        steps = trainer.global_step if pl_module.automatic_optimization else self.penalty.step
        if trainer.log_every_n_steps and steps % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self.penalty.metrics())

    def _take_back_if_skipped(self, trainer: Trainer) -> None:
        added, stepped = self._scale, self._stepped
        self._scale, self._stepped = None, False
        if added is None or self.penalty.step == self._step:
            return
        now = _read_scale(trainer.precision_plugin)
        if now is not None and now < added and not stepped:
            self.penalty.take_back_step()
        # It is settled: a scale that falls later tells of another optimizer's step.
        self.penalty.scale = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def state_dict(self) -> dict[str, Any]:
        return self.penalty.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = True
        self.penalty.load_state_dict(state_dict)


def _has_no_gradient(optimizer: Optimizer) -> bool:
    return all(p.grad is None for group in optimizer.param_groups for p in group["params"])


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler has called a fused optimizer for a step that is skipped."""
    skipped = getattr(optimizer, "found_inf", None)
    return skipped is not None and bool(float(skipped))


def _holds_anchored(optimizer: Optimizer, module: LightningModule, penalty: RotationPenalty) -> bool:
    parameters = find_parameters(module)
    anchored = {id(parameters[name].parameter) for name in penalty.anchors or () if name in parameters}
    # What adapters move is in no optimizer; of their parts nobody knows here. Whether weights train tells nothing:
    # toggle_optimizer freezes those of other optimizers.
    if all(anchored.isdisjoint(_list_held(each)) for each in module.trainer.optimizers):
        return True
    return not anchored.isdisjoint(_list_held(optimizer))


def _list_held(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def _read_scale(precision: Any) -> float | None:
    """Return what GradScaler multiplies losses by; None without one."""
    scaler = getattr(precision, "scaler", None)
    return None if scaler is None or not scaler.is_enabled() else float(scaler.get_scale())


def add_gradients_(fabric: Fabric, penalty: RotationPenalty, model: Any) -> None:
    """Add the penalty's gradient in a loop of Fabric: once per step, before ``fabric.clip_gradients``.

    Args:
        model: what ``fabric.setup`` returned.
    """
    scale = _read_scale(fabric.strategy.precision)
    # Under DDP the gradients are averaged by now: every rank adds the whole penalty.
    penalty.add_gradients_(model.module, 1.0 if scale is None else scale)
