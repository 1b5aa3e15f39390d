"""Whole models as they were measured on a GPU, beside what ``predict`` says about the kernels of today.

A measurement belongs to the commit that was measured; that of another commit, or of other kernels, is a new entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from .gpus import GPUS
from .models import MODELS
from .predict import predict
from .roofline import Job

# The four phases that products take; whatever else a step has is shown as the rest.
_PHASES = ("project", "drift", "pull", "gradient")


@dataclass(frozen=True)
class Machine:
    """Where something was measured, with all versions that matter, and when."""

    gpu: str
    driver: str
    cuda: str
    python: str
    torch: str
    compiler: str
    date: str

    def __str__(self) -> str:
        return (
            f"one {self.gpu}, driver {self.driver}, CUDA {self.cuda}, Python {self.python}, torch {self.torch}, "
            f"kernels compiled ahead of time by {self.compiler}; {self.date}"
        )


@dataclass(frozen=True)
class Measurement:
    """One evaluation with its gradient, base form, bfloat16, added into existing gradients.

    Attributes:
        model, rank: what was computed.
        commit: of this package; "before X" if what is known is that X is newer.
        how: what replayed the launches, a CUDA graph or a loop in Python.
        milliseconds: on the GPU.
        phases: milliseconds of its phases, where they were told apart.
    """

    model: str
    rank: int
    commit: str
    how: str
    milliseconds: float
    phases: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))


H200 = Machine(
    gpu="NVIDIA H200",
    driver="580.159.04",
    cuda="13.0",
    python="3.12.3",
    torch="2.11.0",
    compiler="Triton 3.9.0",
    date="2026-11-26",
)
GRAPH, LOOP = "CUDA graph", "loop"
# All with the plain kernels: the warp-specialised ones have not run on a GPU.
ON_H200 = (
    Measurement("llama-3.1-8b", 768, "3517052", GRAPH, 57.9),
    Measurement(
        "llama-3.1-8b",
        768,
        "before 3517052",
        LOOP,
        57.8,
        MappingProxyType({"project": 23.0, "drift": 2.0, "pull": 4.8, "gradient": 25.3}),
    ),
    Measurement("llama-3.2-1b", 128, "3517052", GRAPH, 5.9),
    Measurement("llama-3.2-1b", 128, "before 3517052", LOOP, 5.23),
    Measurement("qwen2.5-0.5b", 128, "3517052", GRAPH, 4.6),
    Measurement("qwen2.5-0.5b", 128, "before 3517052", LOOP, 3.84),
)


def beside_predicted(measurements: Sequence[Measurement] = ON_H200) -> str:
    """A table in milliseconds: for each model and rank the prediction for the kernels of today, then what was measured
    with those of earlier commits.
    """
    lines = [_line("model", "k", "kernels", "commit", (*_PHASES, "rest", "sum"))]
    for model, rank in dict.fromkeys((each.model, each.rank) for each in measurements):
        prediction = predict(Job(MODELS[model].weights(), rank, GPUS["h200"]))
        milliseconds = {name: 1e3 * prediction.seconds.get(name, 0.0) for name in _PHASES}
        cells = _cells(milliseconds, 1e3 * prediction.total)
        lines.append(_line(model, str(rank), "specialised, predicted", "this one", cells))
        for each in measurements:
            if (each.model, each.rank) == (model, rank):
                cells = _cells(each.phases, each.milliseconds)
                lines.append(_line("", "", f"plain, measured, {each.how}", each.commit, cells))
    return "\n".join(lines)


def _line(model: str, rank: str, kernels: str, commit: str, cells: Sequence[str]) -> str:
    return f"{model:<13}{rank:>4}  {kernels:<28}{commit:<14}" + "".join(f"{cell:>9}" for cell in cells)


def _cells(phases: Mapping[str, float], total: float) -> list[str]:
    shown = [f"{phases[name]:.2f}" if name in phases else "-" for name in _PHASES]
    return [*shown, f"{total - sum(phases.values()):.2f}" if phases else "-", f"{total:.2f}"]
