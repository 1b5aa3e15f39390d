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
from ..penalty import accumulate_rotation_grad_, rotation_penalty
from .batch import Example, answer_logits, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Published with RPSFT.
_BETAS = (0.9, 0.98)


@dataclass(frozen=True)
class Settings:
    """How both runs train: ``steps`` optimizer steps of ``batch`` examples, AdamW with peak rate ``lr``."""

    steps: int
    batch: int
    lr: float


@dataclass
class Run:
    """What a run recorded, in the order of its steps.

    Attributes:
        losses: Task loss (mean cross-entropy, nats per answer token) on each step's batch.
        penalties: R before each step's update.
        seconds: Duration of each step: forward, backward, optimizer and, if it is trained on, the
            penalty. Its mere measurement is left out.
        penalty_seconds: The penalty's part of each step; empty where it is not trained on.
    """

    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    penalty_seconds: list[float] = field(default_factory=list)

    @property
    def seconds_per_step(self) -> float:
        """The median: the first steps allocate, and other processes come and go."""
        return statistics.median(self.seconds)

    @property
    def penalty_seconds_per_step(self) -> float:
        """The median, as of the whole steps."""
        return statistics.median(self.penalty_seconds)

    @property
    def penalty_share(self) -> float:
        """What the penalty adds to a step, as a share of the rest of it: the median of the steps' own ratios.

        Two runs, one after the other, would tell less: machines change their speed in minutes.
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
) -> Run:
    """Train ``model`` in place on ``examples``, in their order.

    Args:
        model: Float parameters that are trained, all of them; its anchors belong to its state before training.
        anchors: What R is measured with.
        examples: ``steps * batch`` of them.
        settings: As for every run that is compared with this one.
        coeff: The paper's lambda; None trains without the penalty and only measures it.
        label: For the progress bar.
        after_step: Called with the number of steps done, after each; its time is not counted.
    """
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=_BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, settings.steps))
    run = Run()
    bar = tqdm(range(settings.steps), label, unit="step")
    for step in bar:
        batch = collate(examples[step * settings.batch : (step + 1) * settings.batch], device)
        if coeff is None:
            with torch.no_grad():
                penalty = rotation_penalty(model, anchors).item()
        start = time.perf_counter()
        optimizer.zero_grad()
        loss = cross_entropy(answer_logits(model, batch), batch.target)
        torch.autograd.backward(loss)
        if coeff is not None:
            begin = _now(device)
            measured = accumulate_rotation_grad_(model, anchors, coeff)
            run.penalty_seconds.append(_now(device) - begin)
        optimizer.step()
        # Reading a number back waits for all that was queued on a GPU before it, so the clock is right.
        run.losses.append(loss.item())
        run.seconds.append(time.perf_counter() - start)
        if coeff is not None:
            penalty = measured.item()
        run.penalties.append(penalty)
        schedule.step()
        bar.set_postfix(loss=f"{run.losses[-1]:.3f}", R=f"{penalty:.3g}")
        after_step(step + 1)
    return run


def _now(device: torch.device) -> float:
    """Seconds, when all that was queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def rate(step: int, steps: int) -> float:
    """Share of the peak learning rate at ``step`` of ``steps``: up over the first tenth, then linearly to 0."""
    warm_up = max(1, steps // 10)
    return min((step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter, on its own device."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def restore_parameters(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give every parameter the value that it had when ``saved`` was copied, and drop its gradient."""
    for name, parameter in model.named_parameters():
        parameter.copy_(saved[name])
        parameter.grad = None


@torch.no_grad()
def relative_drift(model: nn.Module, saved: Mapping[str, Tensor]) -> float:
    """``||W - W0|| / ||W0||`` over all parameters as one vector, W0 being ``saved``."""
    moved = torch.stack([(p - saved[name]).norm() for name, p in model.named_parameters()]).norm()
    return float(moved / torch.stack([w.norm() for w in saved.values()]).norm())
