"""``attach``: the modes after the step as a hook of the optimizer, for loops whose lines one cannot change."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..distributed import find_parameters
from .corrections import correct_
from .penalty import RotationPenalty


def attach(optimizer: Optimizer, penalty: RotationPenalty, model: nn.Module) -> RemovableHandle:
    """Let ``penalty.after_step_`` follow every step that ``optimizer`` makes; returns a handle, whose ``remove()`` ends
    it.

    The model is anchored now, if it is not yet. Learning rates are those of the weights' parameter groups at each step
    (one on a GPU is waited for). A step that GradScaler skips does not count, with fused optimizers neither (for which
    the scaler's verdict is waited for); nor does a step count twice whose class calls the step of its base class.

    Args:
        optimizer: it must hold every anchored weight that trains. Wrappers that keep it as ``.optimizer``
            (Accelerate's) serve as well.
        penalty: of mode ``"decoupled"`` or ``"project"``.
        model: as for :meth:`RotationPenalty.after_step_`.

    Raises:
        ValueError: the mode adds gradients; the optimizer is none of torch's, or lacks weights; or the penalty is
            attached already; or as :meth:`RotationPenalty.after_step_`.
    """
    inner: Any = optimizer
    # Accelerate's wrapper is an Optimizer by name, without hooks of its own.
    while not has_hooks(inner) and getattr(inner, "optimizer", None) is not None:
        inner = inner.optimizer
    if not has_hooks(inner):
        raise ValueError(
            f"optimizer: got {type(optimizer).__name__}, expected a torch.optim.Optimizer, which has hooks after its "
            "step; otherwise call penalty.after_step_(model, lr) after each step"
        )
    if not isinstance(penalty, RotationPenalty):
        raise ValueError(f"penalty: got {type(penalty).__name__}, expected a rk.RotationPenalty")
    if penalty.mode == "gradient":
        raise ValueError(
            "penalty: got mode 'gradient', expected 'decoupled' or 'project', which act after the step: gradients are "
            "clipped and scaled by then; call penalty.add_gradients_(model) before clipping"
        )
    if _is_attached(penalty.attached):
        raise ValueError(
            "penalty: got one that is attached to an optimizer, expected a free one: handle.remove() first"
        )
    anchors = penalty.ready(model)
    # A share of nothing: what cannot be corrected is refused now, and not after the first step.
    correct_(model, anchors, 0.0)
    _check_weights(inner, penalty, model)

    def after_step(stepped: Optimizer, args: Any, kwargs: Any) -> None:
        if _is_within_another_step(stepped) or _was_skipped(stepped):
            return
        penalty.after_step_(model, _learning_rates(stepped))

    penalty.attached = inner.register_step_post_hook(after_step)
    return penalty.attached


def has_hooks(optimizer: object) -> bool:
    """Whether it is an optimizer of torch's, and was made as one: wrappers may be so by name alone."""
    return isinstance(optimizer, Optimizer) and "_optimizer_step_post_hooks" in vars(optimizer)


def _is_attached(handle: RemovableHandle | None) -> bool:
    hooks = None if handle is None else handle.hooks_dict_ref()
    return handle is not None and hooks is not None and handle.id in hooks


def _check_weights(optimizer: Optimizer, penalty: RotationPenalty, model: nn.Module) -> None:
    """Raise a ValueError unless the optimizer holds every anchored weight that trains."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    parameters = find_parameters(model)
    missing = []
    for name in penalty.anchors or ():
        weight = parameters[name].locate(name) if name in parameters else None
        # FSDP1's are views of flat parameters, which are not compared.
        if weight is not None and weight.requires_grad and weight.lasting and id(weight.parameter) not in held:
            missing.append(name)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"optimizer: got one without {len(missing)} of the anchored weights that train ({shown}), expected one "
            "that holds them all: attach after the model is wrapped and the optimizer is made of it; leave weights of "
            "other optimizers out (exclude=...), with a penalty of their own"
        )


def _learning_rates(optimizer: Optimizer) -> float | dict[int, float]:
    """Return the learning rate of all groups, or that of each parameter by its ``id`` where groups differ."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    if len(set(rates)) == 1:
        return rates[0]
    groups = zip(optimizer.param_groups, rates, strict=True)
    return {id(parameter): rate for group, rate in groups for parameter in group["params"]}


def _was_skipped(optimizer: Optimizer) -> bool:
    """Whether the step found that GradScaler's gradients are not finite, and left the weights as they are."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and float(found) != 0.0


def _is_within_another_step(optimizer: Optimizer) -> bool:
    """Whether the hook that asks runs in a step that another step of the same optimizer has called.

    torch wraps ``step`` of each class of which there is an instance. Where both a class and its base are wrapped, a
    step that calls ``super().step()`` runs the hooks twice; the outer run comes when the step has ended.
    """
    # The hook, and what torch has wrapped around the step: one code, whichever class.
    own = inspect.currentframe()
    hook = None if own is None else own.f_back
    frame = None if hook is None else hook.f_back
    if frame is None:
        return False
    code, outer = frame.f_code, frame.f_back
    while outer is not None:
        if outer.f_code is code and (outer.f_locals.get("args") or (None,))[0] is optimizer:
            return True
        outer = outer.f_back
    return False
