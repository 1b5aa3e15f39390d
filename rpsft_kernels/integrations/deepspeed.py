"""Where the penalty goes under DeepSpeed, whose engine reduces, clips, steps and clears gradients within one call.

ZeRO-0, 1 and 2 take gradients away during the backward pass: the penalty is a term of the last micro-batch's loss.
ZeRO-3's partitions may be added to between the backward pass and the step. Nothing here imports DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ..training import RotationPenalty


def check_mode(penalty: RotationPenalty) -> None:
    """Raise a ValueError for the modes after the step, and for budgets."""
    if penalty.mode != "gradient":
        raise ValueError(
            f"mode: got {penalty.mode!r} under DeepSpeed, expected 'gradient': DeepSpeed steps float32 copies of its "
            "own, which overwrite the weights at the next step; or shard with FSDP2"
        )
    if penalty.needs_task_gradient:
        raise ValueError(
            "budget: got one under DeepSpeed, expected coeff: a budget begins with the task's gradient, which "
            "DeepSpeed keeps to itself; or shard with FSDP2"
        )


def penalise_backward(
    backward: Callable[..., None], penalty: RotationPenalty, engine: Any, divisor: float = 1.0
) -> Callable[..., None]:
    """Return Accelerate's ``backward``, which steps the engine too, for the last micro-batch of a step.

    Args:
        backward: takes the loss, and options.
        divisor: what the engine divides the loss by.
    """
    check_mode(penalty)

    def backward_with_penalty(loss: Tensor, **options: Any) -> None:
        if engine.zero_optimization_stage() < 3:
            # The caller keeps the loss itself, which is what gets logged.
            backward(loss + divisor * penalty.loss_term(engine), **options)
        else:
            with replace(engine, "step", _precede(engine.step, lambda: penalty.add_gradients_(engine))):
                backward(loss, **options)

    return backward_with_penalty


@contextmanager
def replace(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Let an object have another method within the block."""
    before = owner.__dict__.get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _precede(step: Callable[..., Any], first: Callable[[], Any]) -> Callable[..., Any]:
    def step_after(*args: Any, **options: Any) -> Any:
        first()
        return step(*args, **options)

    return step_after
