"""Parameters whose gradients are taken within the backward pass, by optimizers that step there.

What is added to such a gradient after the pass comes too late: the step has been taken, and the gradient is freed, or
will be cleared.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from itertools import islice
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..private_names import hooks_after_gradient, hooks_before_gradient, optimizers_in_backward

_DEPTH = 4
# Dictionaries of optimizers have one entry a parameter.
_MOST = 16
_WAYS = (
    "put rotation_penalty into the loss, so that the backward pass has the whole gradient; a hook that only looks at "
    "gradients belongs into register_hook, and uses no optimizer"
)


def reason_consumed(parameter: Tensor) -> str | None:
    """Say why the parameter's gradient may be taken before an optimizer step outside of the backward pass could read
    what is added to it; None if nothing is known against it.
    """
    hooks, earlier = hooks_after_gradient(parameter), hooks_before_gradient(parameter)
    if not hooks and not earlier and not optimizers_in_backward(parameter):
        return None
    own = [hook for hook in hooks if not _module_of(hook).startswith("torch.")]
    # LOMO steps in the hooks of register_hook.
    if optimizers_in_backward(parameter) or any(_reaches_optimizer(hook) for hook in (*hooks, *earlier)):
        return (
            "got a parameter whose optimizer steps within the backward pass, expected one whose .grad is read by a "
            f"later step: {_WAYS}"
        )
    if own and parameter.grad is None:
        return (
            f"got no gradient, and {len(own)} hooks (register_post_accumulate_grad_hook) that may free it or change "
            "what is added before the backward pass, expected a gradient that is complete: call "
            f"accumulate_rotation_grad_ after the backward pass if the hooks leave .grad there; else {_WAYS}"
        )
    return None


def _module_of(hook: Any) -> str:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return str(getattr(hook, "__module__", ""))


def _reaches_optimizer(hook: Any) -> bool:
    """Whether a hook uses an optimizer: in its closure, its arguments, the globals that it names, or the attributes of
    objects among these that it names.
    """
    level, seen = [hook], {id(hook)}
    names: set[str] = set()
    for _ in range(_DEPTH):
        below = []
        for item in level:
            if isinstance(item, Optimizer):
                return True
            for held in _held_by(item, names):
                if id(held) not in seen:
                    seen.add(id(held))
                    below.append(held)
        level = below
    return any(isinstance(item, Optimizer) for item in level)


def _held_by(item: Any, names: set[str]) -> Iterator[Any]:
    """Yield what an object holds; of other objects than functions and containers only attributes of these names, to
    which those that a function's code uses are added.
    """
    if isinstance(item, functools.partial):
        yield from (item.func, *item.args, *item.keywords.values())
    elif isinstance(item, Mapping):
        yield from islice(item.values(), _MOST)
    elif isinstance(item, (list, tuple, set)):
        yield from islice(item, _MOST)
    elif isinstance(item, MethodType):
        yield from (item.__func__, item.__self__)
    elif isinstance(item, FunctionType):
        names.update(item.__code__.co_names)
        yield from item.__defaults__ or ()
        for cell in item.__closure__ or ():
            try:
                yield cell.cell_contents
            except ValueError:
                # A variable that has no value yet.
                continue
        yield from (item.__globals__[name] for name in item.__code__.co_names if name in item.__globals__)
    elif not isinstance(item, (Tensor, type, ModuleType)) and hasattr(item, "__dict__"):
        yield from (value for name, value in list(vars(item).items()) if name in names)
