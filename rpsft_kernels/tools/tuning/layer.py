"""A layer to tune with: its variants under a tile table, and the launches of one of its phases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ...ops.operands import Operands
from ...ops.runs import open_run
from ...ops.triton import device as devices
from ...ops.triton.launch import Launch, watch_launches
from ...ops.triton.operation import facts_of, group_by_key
from ...ops.triton.program import TritonProgram
from ...ops.triton.project_drift import describe_projected, plan_forward
from ...ops.triton.pull_back import describe_gradient, plan_backward
from ...ops.triton.variants import Variant, reduce_variant

# The kernels of each phase. ``round`` and ``reduce`` are launched or not with the tiles of their phase; ``squares``
# always is.
KERNELS_OF = {
    "project": ("project", "hopper_project"),
    "drift": ("drift", "reduce"),
    "pull": ("round", "pull", "hopper_pull"),
    "gradient": ("gradient", "hopper_gradient"),
}


class _Recorder:
    """The launches of a thread, in order."""

    def __init__(self) -> None:
        self.launches: list[tuple[Variant, int, tuple[Tensor, ...]]] = []

    def on_launch(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        self.launches.append((variant, programs, arguments))

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        """The error itself is raised."""


class Layer:
    """Random weights (m, n) of one layer in bfloat16 with anchors in base form, gradients and drifts, on a device."""

    def __init__(self, shapes: Sequence[tuple[int, int]], rank: int, device: torch.device) -> None:
        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device).mul_(0.02).to(torch.bfloat16)

        self._device, self._count = device, len(shapes)
        pretrained = [random(*shape) for shape in shapes]
        weights = [base + 1e-3 * random(*base.shape) for base in pretrained]
        lefts, rights = [random(m, rank) for m, _ in shapes], [random(n, rank) for _, n in shapes]
        self._operands = Operands(weights, lefts, rights, pretrained)
        self._grads = [torch.zeros_like(weight) for weight in weights]
        self._drifts = [torch.randn(rank, rank, device=device) for _ in shapes]

    def list_variants(self, phase: str) -> list[Variant]:
        """The variants that a phase launches with the tile table in force."""
        variants = self._forward_variants() if phase in ("project", "drift") else self._backward_variants()
        return [variant for variant in dict.fromkeys(variants) if variant.kernel in KERNELS_OF[phase]]

    def _forward_variants(self) -> Iterator[Variant]:
        profile = devices.device_profile(self._device)
        operands = self._operands
        weights, pretrained = facts_of(operands.weights), facts_of(operands.pretrained)
        lefts, rights = facts_of(operands.lefts), facts_of(operands.rights)
        described = [
            describe_projected(*facts, profile) for facts in zip(weights, lefts, rights, pretrained, strict=True)
        ]
        for group in group_by_key(described):
            plan = plan_forward(profile, group.key, group.problems, False, group.key.aligned)
            yield from (plan.project, plan.drift)
            if plan.reduce_schedule is not None:
                yield reduce_variant(plan.drift)

    def _backward_variants(self) -> Iterator[Variant]:
        profile = devices.device_profile(self._device)
        lefts, rights = facts_of(self._operands.lefts), facts_of(self._operands.rights)
        described = [
            describe_gradient(*facts, profile) for facts in zip(lefts, rights, facts_of(self._grads), strict=True)
        ]
        for group in group_by_key(described):
            plan = plan_backward(profile, group.key, group.problems, group.key.aligned, True)
            yield from (plan.pull, plan.gradient)
            if plan.rounding is not None:
                yield plan.rounding

    @contextmanager
    def open_phase(self, phase: str) -> Iterator[Callable[[], None]]:
        """Run the projection or the gradients once; gives a function that queues the launches of one phase again."""
        recorder = _Recorder()
        with open_run(TritonProgram(self._device, [self._count])) as step:
            if phase in ("project", "drift"):
                step.stage_projection(0, self._operands, keep=False)
                step.send()
                with watch_launches(recorder):
                    step.project(0)
            else:
                scales = [1.0] * self._count
                anchors = self._operands.for_pull_back()
                staged = step.stage_pull_back(
                    0, range(self._count), anchors, self._grads, scales, accumulate=True, drifts=self._drifts
                )
                step.send()
                with watch_launches(recorder):
                    step.pull_back_(staged)
            launches = [
                Launch(variant, programs, self._device, *arguments)
                for variant, programs, arguments in recorder.launches
                if variant.kernel in KERNELS_OF[phase]
            ]

            def queue() -> None:
                for launch in launches:
                    launch()

            # The run is kept open: its table and its scratch memory belong to the launches.
            yield queue
