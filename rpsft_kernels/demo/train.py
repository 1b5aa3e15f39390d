"""One fine-tuning run, with or without the rotation penalty."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ..anchors.anchor import Anchor
from ..penalty import accumulate_rotation_grad_
from .batch import Example, answer_logits, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Published with RPSFT.
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Settings:
    """The settings of all runs: ``steps`` optimizer steps of ``batch`` examples, AdamW with peak rate ``lr``.

    ``autocast`` computes the model's forward pass in bfloat16 where torch.autocast does; weights stay in float32.
    """

    steps: int
    batch: int
    lr: float
    autocast: bool = False


@dataclass
class TrainingRun:
    """The record of a run, in the order of its steps.

    Attributes:
        losses: Task loss (mean cross-entropy, nats per answer token) on each step's batch.
        penalties: R before each step's update; empty where it is not trained on.
        seconds: Duration of each step: forward, backward, optimizer and, if it is trained on, the penalty.
        penalty_seconds: The penalty's share of each duration; empty where it is not trained on.
    """

    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    penalty_seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """The median, because the first steps allocate, and other processes come and go."""
        return statistics.median(self.seconds)

    @property
    def penalty_seconds_per_step(self) -> float:
        """The median, as for whole steps."""
        return statistics.median(self.penalty_seconds)

    @property
    def penalty_share(self) -> float:
        """Time that the penalty adds to a step, as a share of the rest of it: the median of the steps' own ratios.

        A comparison of two successive runs would say less: machines change their speed in minutes.
        """
        return statistics.median(p / (s - p) for p, s in zip(self.penalty_seconds, self.seconds, strict=True))


def fine_tune(
    model: PreTrainedModel,
    anchors: Mapping[str, Anchor],
    examples: Sequence[Example],
    settings: Settings,
    coeff: float | None,
    label: str,
    after_step: Callable[[int], None],
) -> TrainingRun:
    """Train ``model`` in place on ``examples``, in their order.

    Args:
        model: Float parameters that are trained, all of them; its anchors belong to its state before training.
        anchors: The anchors of the penalty; not used without it.
        examples: ``steps * batch`` of them.
        settings: The settings, equal for all runs that are compared.
        coeff: The paper's lambda; None trains without the penalty.
        label: For the progress bar.
        after_step: Called with the number of steps done, after each; its time is not counted.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=_BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_rate(step, settings.steps))
    run = TrainingRun()
    bar = tqdm(range(settings.steps), label, unit="step")
    for step in bar:
        batch = collate(examples[step * settings.batch : (step + 1) * settings.batch], device)
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
            logits = answer_logits(model, batch)
        loss = cross_entropy(logits, batch.target)
        torch.autograd.backward(loss)
        if coeff is not None:
            begin = _now(device)
            measured = accumulate_rotation_grad_(model, anchors, coeff)
            run.penalty_seconds.append(_now(device) - begin)
        optimizer.step()
        # Reading a number back waits for all work that was queued on a GPU before it, so the clock is right.
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
        shown = {"loss": f"{run.losses[-1]:.3f}"}
        if coeff is not None:
            run.penalties.append(measured.item())
            shown["R"] = f"{run.penalties[-1]:.3g}"
        schedule.step()
        bar.set_postfix(shown)
        after_step(step + 1)
    return run


def _now(device: torch.device) -> float:
    """Read the clock, in seconds, after all work that was queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def schedule_rate(step: int, steps: int) -> float:
    """Return the learning rate at ``step`` of ``steps``, over its peak: up in the first tenth, then linearly to 0."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter, each on its own device."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def restore_parameters(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give every parameter the value that it had when ``saved`` was copied, and drop its gradient."""
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])
        parameter.grad = None


@torch.no_grad()
def relative_drift(model: nn.Module, saved: Mapping[str, Tensor]) -> float:
    """Compute ``||W - W0|| / ||W0||`` over all parameters as one vector; ``saved`` is W0."""
    moved = torch.stack([(p - saved[name]).norm() for name, p in model.named_parameters()]).norm()
    return float(moved / torch.stack([w.norm() for w in saved.values()]).norm())
