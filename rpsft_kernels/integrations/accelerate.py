"""The rotation penalty in a loop of Accelerate: ``attach(accelerator, penalty, model)`` after ``accelerator.prepare``.

The gradient is added where the loop calls ``accelerator.clip_grad_norm_``, once per step, before it clips. A loop that
steps without that call is refused at its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..private_names import prepared_models, prepared_optimizers, without_compiler
from ..training import attach as attach_to_optimizer
from .checks import check_penalty
from .deepspeed import check_mode, penalise_backward
from .replicas import check_replicas
from .scaled import read_scale, was_skipped

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ImportError as error:
    raise ImportError("rpsft_kernels.integrations.accelerate needs Accelerate: pip install accelerate") from error

if TYPE_CHECKING:
    from ..training import RotationPenalty

_MARK = "_rotation_penalty"


def attach(accelerator: Accelerator, penalty: RotationPenalty, model: nn.Module) -> None:
    """Let every optimizer step of a loop have the penalty, and ``save_state`` and ``load_state`` its state.

    Args:
        penalty: is anchored now, at the weights that ``model`` has: call this before ``accelerator.load_state``.
        model: what ``accelerator.prepare`` returned.

    Raises:
        ValueError: nothing was prepared; a penalty is attached already; or the accelerator's way of distributing does
            not let gradients be added to.
    """
    check_penalty(penalty, "penalty")
    if not isinstance(accelerator, Accelerator):
        raise ValueError(
            f"accelerator: got {type(accelerator).__name__}, expected an accelerate.Accelerator: "
            "attach(accelerator, penalty, model)"
        )
    if getattr(accelerator, _MARK, None) is not None:
        raise ValueError("accelerator: got one that has a penalty attached, expected one without: R would count twice")
    # It keeps models as they were before it wrapped and compiled them.
    prepared = any(_bare(kept) is _bare(model) for kept in prepared_models(accelerator))
    if not (prepared and prepared_optimizers(accelerator)):
        raise ValueError(
            "model: got one that this accelerator has not prepared with an optimizer, expected what "
            "accelerator.prepare(model, optimizer) returned"
        )
    if accelerator.distributed_type in (DistributedType.MEGATRON_LM, DistributedType.XLA):
        raise ValueError(
            f"accelerator: got {accelerator.distributed_type.value}, expected one process, DDP, FSDP or DeepSpeed: the "
            "penalty does not know where gradients lie there"
        )
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError(
            "accelerator: got FSDP1, expected FSDP2: FullyShardedDataParallelPlugin(fsdp_version=2); or call "
            "penalty.add_gradients_(model) before clipping, and do not attach"
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        check_mode(penalty)
        penalty.anchor(model)
        check_replicas(penalty)
        _attach_to_deepspeed(accelerator, penalty, model)
    else:
        optimizers = prepared_optimizers(accelerator)
        if penalty.mode != "gradient" and len(optimizers) > 1:
            raise ValueError(
                f"accelerator: got {len(optimizers)} optimizers in mode {penalty.mode!r}, expected one; "
                "call penalty.after_step_(model, lr) after the last of them, and do not attach"
            )
        # DDP has averaged the gradients when they are clipped: every rank adds the whole penalty, to the bare model.
        bare = _bare(model)
        penalty.anchor(bare)
        check_replicas(penalty)
        if penalty.mode == "gradient":
            _Loop(accelerator, penalty, bare)
        else:
            attach_to_optimizer(optimizers[0], penalty, bare)
    accelerator.register_for_checkpointing(penalty)
    setattr(accelerator, _MARK, penalty)


def _bare(model: nn.Module) -> nn.Module:
    model = without_compiler(model)
    return model.module if isinstance(model, DistributedDataParallel) else model


def _attach_to_deepspeed(accelerator: Accelerator, penalty: RotationPenalty, engine: Any) -> None:
    backward = accelerator.backward
    last = penalise_backward(backward, penalty, engine, divisor=engine.gradient_accumulation_steps())

    def backward_or_last(loss: Tensor, **options: Any) -> None:
        if not accelerator.sync_gradients:
            backward(loss, **options)
            return
        last(loss, **options)
        # The engine has stepped by now, unless gradients in float16 overflowed.
        if getattr(engine.optimizer, "overflow", False):
            penalty.take_back_step()

    accelerator.backward = backward_or_last


class _Loop:
    """Stands between a loop and its accelerator: notes new gradients, and adds the penalty where they are clipped."""

    def __init__(self, accelerator: Accelerator, penalty: RotationPenalty, model: nn.Module) -> None:
        self._accelerator, self._penalty, self._model = accelerator, penalty, model
        # Whether gradients have come that the penalty was not added to.
        self._due = False
        # Whether the penalty was added to gradients that no optimizer has stepped with.
        self._unstepped = False
        backward = accelerator.backward

        def note_and_backward(loss: Tensor, **options: Any) -> None:
            self._due = True
            backward(loss, **options)

        accelerator.backward = note_and_backward
        accelerator.clip_grad_norm_ = self._before(accelerator.clip_grad_norm_)
        accelerator.clip_grad_value_ = self._before(accelerator.clip_grad_value_)
        for optimizer in prepared_optimizers(accelerator):
            optimizer.step = self._between(optimizer)

    def _before(self, clip: Callable[..., Any]) -> Callable[..., Any]:
        def add_and_clip(parameters: Tensor | Iterable[Tensor], *args: Any, **options: Any) -> Any:
            # An iterator can be read once.
            listed = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            # Another model's gradients may be clipped first: this one's are cleared before its own backward pass.
            if self._holds_any(listed):
                self._add()
            return clip(listed, *args, **options)

        return add_and_clip

    def _holds_any(self, parameters: Iterable[Tensor]) -> bool:
        return not {id(p) for p in self._model.parameters()}.isdisjoint(map(id, parameters))

    def _trains(self, optimizer: Any) -> bool:
        return self._holds_any(p for group in optimizer.param_groups for p in group["params"])

    def _add(self) -> None:
        # A second call within a step, for other parameters, clips what has the penalty.
        if self._accelerator.sync_gradients and self._due:
            self._penalty.add_gradients_(self._model, read_scale(self._accelerator.scaler))
            self._due, self._unstepped = False, True

    def _between(self, optimizer: Any) -> Callable[..., Any]:
        step = optimizer.step

        def refuse_or_step(*args: Any, **options: Any) -> Any:
            self._refuse_if_due(optimizer)
            result = step(*args, **options)
            if self._accelerator.sync_gradients and self._unstepped and self._trains(optimizer):
                # Of several optimizers the first tells.
                self._unstepped = False
                if was_skipped(optimizer, self._penalty):
                    self._penalty.take_back_step()
                # It is settled: a scale that falls later tells of another optimizer's step.
                self._penalty.scale = None
            return result

        return refuse_or_step

    def _refuse_if_due(self, optimizer: Any) -> None:
        if self._accelerator.sync_gradients and self._due and self._trains(optimizer):
            raise ValueError(
                "accelerator.clip_grad_norm_: got no call between the last backward pass and optimizer.step(), "
                "expected one: the penalty is added there. Clip with it (max_norm=float('inf') clips nothing), or call "
                "penalty.add_gradients_(model) and do not attach"
            )
