"""A call with a prepared plan against the same call without one: R and all gradients, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from rpsft_kernels.evaluation import plan
from support import exact_gradient, exact_penalty, relative_error

COEFF = 0.3
RANK = 8
# Largest relative error against float64 of a float32 or a rounded result, by the dtype of a weight's gradient.
BOUNDS = {torch.float32: 0.01, torch.bfloat16: 0.02, torch.float64: 0.01}
Weights = nn.Module | Sequence[Tensor] | Tensor


class Layers(nn.Module):
    """Weights of several forms, shapes and dtypes; those of ``square`` and ``twin`` may be tied."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, bias=False)
        self.block = nn.Sequential(nn.Linear(40, 24, bias=False))
        self.square = nn.Linear(32, 32, bias=False)
        self.twin = nn.Linear(32, 32, bias=False)
        self.full = nn.Linear(7, 5)


def forget() -> None:
    """Drop every plan: the next call prepares its own."""
    plan._cache.clear()


@dataclass
class Case:
    """A model that has moved from its anchors, which a test may change."""

    model: nn.Module
    anchors: dict[str, rk.Anchor]
    coeff: float = COEFF
    # Objects that a mutation replaced, so that no other gets their addresses.
    kept: list[object] = field(default_factory=list)

    @classmethod
    def make(cls, model: nn.Module | None = None) -> Case:
        torch.manual_seed(0)
        model = Layers() if model is None else model
        anchors = dict(rk.Anchors.from_model(model, RANK, progress=False))
        move(model)
        return cls(model, anchors)

    def parameters(self) -> list[nn.Parameter]:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        return [named[name] for name in self.anchors]

    def calls(self) -> None:
        """Both calls, for the plans that they leave."""
        both_calls(self.model, self.anchors, self.parameters(), self.coeff, False)

    def check(self, lists: bool = True) -> None:
        """Both calls on the model, and on a list of its weights where that is allowed."""
        anchors = list(self.anchors.values())
        check(self.model, self.anchors, self.parameters(), anchors, self.coeff)
        if not lists:
            return
        if all(parameter.requires_grad for parameter in self.parameters()):
            check(self.parameters(), anchors, self.parameters(), anchors, self.coeff)


def move(model: nn.Module, seed: int = 1) -> None:
    """Add noise to every parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def check(
    weights: Weights,
    anchors: object,
    parameters: Sequence[Tensor],
    of_parameters: Sequence[rk.Anchor],
    coeff: float = COEFF,
) -> None:
    """Make both calls with the plans at hand, then with fresh ones, and compare with float64. The second set of
    gradients stays.

    Args:
        parameters: the weights' leaves, those that are frozen too; ``of_parameters``: their anchors.
    """
    before = [(parameter, copied(parameter.grad)) for parameter in unique(parameters)]
    found = []
    for fresh in (False, True):
        for parameter, grad in before:
            restore(parameter, grad)
        found.append(both_calls(weights, anchors, parameters, coeff, fresh))
    (one, grads, pulled), (other, other_grads, other_pulled) = found
    assert same(one, other), "R differs from that of a fresh call"
    assert all(map(same, grads, other_grads)), "gradients that were added to differ from those of a fresh call"
    assert all(map(same, pulled, other_pulled)), "gradients of a backward pass differ from those of a fresh call"
    exact = sum(float(exact_penalty(p.detach(), a)) for p, a in zip(parameters, of_parameters, strict=True))
    assert abs(float(one) - exact) <= 0.02 * exact
    gradients: dict[int, Tensor] = {}
    for parameter, anchor in zip(parameters, of_parameters, strict=True):
        if parameter.requires_grad:
            gradient = exact_gradient(parameter.detach(), anchor)
            gradients[id(parameter)] = gradients.get(id(parameter), torch.zeros(())) + gradient
    for (parameter, grad), added, alone in zip(before, grads, pulled, strict=True):
        if not parameter.requires_grad:
            assert added is None or (grad is not None and same(added, grad))
            continue
        assert added is not None
        wanted = gradients[id(parameter)]
        base = torch.zeros(()) if grad is None else grad.double()
        assert relative_error(added, base + coeff * wanted) <= BOUNDS[added.dtype]
        if parameter.dtype in BOUNDS and alone is not None:
            assert relative_error(alone, wanted) <= BOUNDS[alone.dtype]


def both_calls(
    weights: Weights, anchors: object, parameters: Sequence[Tensor], coeff: float, fresh: bool
) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
    """R, which both calls must give, the gradients that one adds to, and those of the other's backward pass."""
    leaves = unique(parameters)

    def prepare() -> None:
        if fresh:
            forget()

    prepare()
    summed = rk.accumulate_rotation_grad_(weights, anchors, coeff)  # type: ignore[arg-type]
    prepare()
    penalty = rk.rotation_penalty(weights, anchors)  # type: ignore[arg-type]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    pulled = dict(zip(map(id, wanted), torch.autograd.grad(penalty, wanted), strict=True))
    assert penalty.detach().equal(summed), "the calls give different R"
    return summed, [copied(leaf.grad) for leaf in leaves], [pulled.get(id(leaf)) for leaf in leaves]


def unique(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def copied(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


def restore(parameter: Tensor, grad: Tensor | None) -> None:
    """Give a gradient its values again, where it lies; or take it away."""
    if grad is None or parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad.copy_(grad)


def same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.dtype == other.dtype and torch.equal(one, other)


@contextmanager
def no_new_plan() -> Iterator[None]:
    """Every call inside must find its plan."""
    made: list[object] = []
    init = plan.Plan.__init__

    def noted(self: plan.Plan, *arguments: object) -> None:
        made.append(self)
        init(self, *arguments)  # type: ignore[arg-type]

    plan.Plan.__init__ = noted  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        plan.Plan.__init__ = init  # type: ignore[method-assign]
    assert not made, "a plan was made where nothing had changed"


Mutation = Callable[[Case], None]
