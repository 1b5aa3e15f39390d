"""What an optimizer receives in somebody's training loop, and what it should: task + coeff dR/dW, then clipped."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import rpsft_kernels as rk
from llama import expected

Named = dict[str, Tensor]


@dataclass
class Step:
    """One optimizer step: the weights before it, the gradients that it received, and its micro-batches."""

    weights: Named
    gradients: Named
    batches: list[dict[str, Any]] = field(default_factory=list)


class Recorder(torch.optim.Optimizer):
    """Records what its steps receive, and moves the weights by noise that only the number of the step decides.

    Two runs thus see the same weights, with the penalty and without it. The parameters are named when it steps.
    """

    def __init__(self, model: nn.Module, lr: float = 1e-2, moved: float = 0.01) -> None:
        super().__init__([p for p in model.parameters() if p.requires_grad], {"lr": lr})
        self._names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
        self._moved = moved
        self.steps: list[Step] = []
        self.batches: list[dict[str, Any]] = []
        # Weights after each step, before anything acts on them.
        self.after: list[Named] = []

    def _parameters(self) -> Named:
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(id(p) not in self._names for p in parameters):
            # FSDP2 has put others into their places.
            return dict(zip(self._names.values(), parameters, strict=True))
        return {self._names[id(p)]: p for p in parameters}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        parameters = self._parameters()
        gradients = {name: _whole(p.grad).double() for name, p in parameters.items() if p.grad is not None}
        weights = {name: _whole(p.detach()).clone() for name, p in parameters.items()}
        self.steps.append(Step(weights, gradients, self.batches))
        self.batches = []
        generator = torch.Generator().manual_seed(len(self.steps))
        for parameter in parameters.values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                noise = distribute_tensor(noise, parameter.device_mesh, parameter.placements)
            parameter.add_(self._moved * noise)
        self.after.append({name: _whole(p.detach()).clone() for name, p in parameters.items()})
        return result

    def listen(self, model: nn.Module) -> AbstractContextManager[None]:
        """Record the arguments of the model's forward passes in training."""
        return listen(model, lambda: self)


class FusedRecorder(Recorder):
    """Unscales gradients itself, and is called for the steps that GradScaler skips, as torch's fused optimizers are."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        # GradScaler sets both for the time of a step.
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and float(found):
            return None
        for parameter in self._parameters().values():
            if parameter.grad is not None and scale is not None:
                parameter.grad.div_(scale)
        return super().step(closure)


def overflow(model: nn.Module, steps: Sequence[int]) -> None:
    """Let the gradient of a vector be infinite in some of the backward passes, counted from 0."""
    vector = next(p for p in model.parameters() if p.dim() == 1)
    count = itertools.count()
    vector.register_hook(lambda gradient: gradient * (float("inf") if next(count) in steps else 1.0))


@contextmanager
def listen(model: nn.Module, recorder: Callable[[], Recorder]) -> Iterator[None]:
    """Let a recorder that may still have to be made record the arguments of a model's forward passes in training."""

    def note(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            recorder().batches.append(copy.deepcopy({k: v for k, v in kwargs.items() if v is not None}))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def repeat_in_float64(model: nn.Module, step: Step, divide: bool = False) -> Named:
    """Return the task's gradients of a step: its micro-batches' losses, in float64.

    Args:
        model: of the same kind, whose values do not matter.
        divide: by the number of micro-batches, where the model's loss is a mean of each.
    """
    exact = copy.deepcopy(model).double()
    parameters = dict(exact.named_parameters())
    with torch.no_grad():
        for name, weight in step.weights.items():
            parameters[name].copy_(weight)
    exact.zero_grad()
    for batch in step.batches:
        loss = exact(**batch).loss
        (loss / len(step.batches) if divide else loss).backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


def rotation_gradients(model: nn.Module, weights: Named, anchors: rk.Anchors) -> Named:
    """Return dR/dW by its definition, in float64."""
    moved = copy.deepcopy(model)
    parameters = dict(moved.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return expected(moved, anchors)[1]


def received(model: nn.Module, step: Step, task: Named, anchors: rk.Anchors, coeff: float, clip: float | None) -> Named:
    """Return what the optimizer should have received: ``task + coeff dR/dW``, clipped by the norm of it all."""
    found = {name: gradient.double().clone() for name, gradient in task.items()}
    for name, gradient in rotation_gradients(model, step.weights, anchors).items():
        found[name] = found.get(name, torch.zeros_like(gradient)) + coeff * gradient
    if clip is not None:
        norm = torch.stack([g.norm() for g in found.values()]).norm()
        factor = min(1.0, float(clip / (norm + 1e-6)))
        found = {name: factor * g for name, g in found.items()}
    return found


def error(found: Named, wanted: Named) -> float:
    """Return the relative error of all gradients together."""
    assert set(found) == set(wanted), set(found) ^ set(wanted)
    difference = torch.stack([(found[n].double() - wanted[n].double()).norm() for n in wanted]).norm()
    return float(difference / torch.stack([g.double().norm() for g in wanted.values()]).norm())


def batches_of(size: int, vocabulary: int, length: int = 12) -> list[dict[str, Any]]:
    """Return examples of random tokens, of different lengths of what counts in the loss."""
    generator = torch.Generator().manual_seed(5)
    examples = []
    for i in range(size):
        tokens = torch.randint(3, vocabulary, (length,), generator=generator)
        labels = tokens.clone()
        labels[: i % 5] = -100
        examples.append({"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)})
    return examples


def worst(
    model: nn.Module,
    steps: Sequence[Step],
    tasks: Sequence[Named],
    anchors: rk.Anchors,
    coeff: float,
    clip: float | None,
) -> float:
    """Return the largest error over all steps."""
    assert len(steps) == len(tasks) > 1
    return max(
        error(step.gradients, received(model, step, task, anchors, coeff, clip))
        for step, task in zip(steps, tasks, strict=True)
    )


def expected_penalty(model: nn.Module, weights: Named, anchors: rk.Anchors) -> float:
    """Return R by its definition, in float64."""
    moved = copy.deepcopy(model)
    parameters = dict(moved.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
    return expected(moved, anchors)[0]


def closed_form(
    model: nn.Module, weights: Named, anchors: rk.Anchors, mode: str, *, lr: float, coeff: float, budget: float
) -> Named:
    """Return what a mode after the step makes of weights, in float64: W - s U C V^T.

    "decoupled": s = 2 lr coeff / (1 + 2 lr coeff). "project": the s that leaves R at the budget, or 0.
    """
    gradients = rotation_gradients(model, weights, anchors)
    if mode == "decoupled":
        share = 2 * lr * coeff / (1 + 2 * lr * coeff)
    else:
        # ||dR/dW|| is 2 sqrt(R).
        penalty = sum(float(g.square().sum()) for g in gradients.values()) / 4
        bound = budget**2 * sum(
            float(torch.linalg.svdvals(anchor.base.double())[: anchor.rank].square().sum())  # type: ignore[union-attr]
            for anchor in anchors.values()
        )
        share = 1 - min(1.0, (bound / penalty) ** 0.5)
    found = {name: weight.double().clone() for name, weight in weights.items()}
    for name, gradient in gradients.items():
        found[name] -= share * gradient / 2
    return found
