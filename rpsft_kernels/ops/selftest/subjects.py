"""What there is to test on a device: backends, instruction sets, and with which cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .. import native
from ..dispatch import load
from ..triton.aot import dispatch as aot
from ..triton.device import device_profile, own_profile
from ..triton.tile_table import tuned_architecture
from .cases import RANKS, Case, all_cases, quick_cases
from .checks import Subject
from .suite import REPEATS, Result, run

# On the CPU every repetition takes as long as the first.
_MODEST_REPEATS = 3


@dataclass(frozen=True)
class Job:
    """A run that is to be made; ``complete``: its cases launch every kernel of the device. ``environment``: variables
    that are set meanwhile.
    """

    title: str
    subject: Subject
    cases: list[Case]
    complete: bool = False
    repeats: int = REPEATS
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, progress: Callable[[int], None] | None = None) -> Result:
        with _undisturbed(self.subject.device), _environment(self.environment):
            return run(self.subject, self.cases, self.complete, self.repeats, progress)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Whatever modes the caller is in: no graph, no inference tensors, nothing cast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def jobs(device: torch.device, quick: bool) -> tuple[list[Job], list[str]]:
    """Everything that can be tested on a device, and what cannot, with the reasons."""
    return _of_gpu(device, quick) if device.type == "cuda" else _of_cpu(device, quick)


def quick_of_gpu(device: torch.device) -> Result:
    """What runs by itself before the first launch."""
    return _triton_job(device, quick=True).run()


def _of_gpu(device: torch.device, quick: bool) -> tuple[list[Job], list[str]]:
    cases = list(quick_cases((32, 129))) if quick else list(_modest_cases())
    name = torch.cuda.get_device_properties(device).name
    plain = Job(f"torch on {device}: {name}", Subject("torch", device, bitwise=False), cases, repeats=1)
    reason = load("triton").unavailable(device, torch.bfloat16)
    if reason is not None:
        return [plain], [f"triton on {device}: not tested: {reason}"]
    # The quick part is what runs by itself, for the kernels alone.
    return [_triton_job(device, quick)] + ([] if quick else [plain]), []


def _triton_job(device: torch.device, quick: bool) -> Job:
    profile = device_profile(device)
    own, tuned = own_profile(device).architecture, tuned_architecture()
    ahead = torch.version.hip is None and aot.served_table(device, own, tuned)
    # Compiling takes seconds a kernel: of what is not compiled yet, the class of the published rank is enough.
    cases = list(quick_cases(RANKS if ahead else RANKS[-1:])) if quick else list(all_cases())
    name = torch.cuda.get_device_properties(device).name
    code = "compiled ahead of time" if ahead else "compiled by Triton where they are not yet"
    title = f"triton on {device}: {name}, kernels of table {profile.architecture}, {code}"
    return Job(title, Subject("triton", device), cases, complete=not quick)


def _of_cpu(device: torch.device, quick: bool) -> tuple[list[Job], list[str]]:
    cases = list(quick_cases((32, 129))) if quick else list(_modest_cases())
    # A library's products may depend on where their operands lie.
    found = [Job("torch on the CPU", Subject("torch", device, bitwise=False), cases, repeats=1)]
    untested = []
    if native.instruction_sets():
        for name in native.instruction_sets():
            title = f"native on the CPU: instruction set {name}"
            environment = {"RPSFT_ISA": name}
            found.append(Job(title, Subject("native", device), cases, repeats=_MODEST_REPEATS, environment=environment))
    else:
        untested.append(f"native on the CPU: not tested: {native.missing()}")
    reason = load("triton").unavailable(device, torch.bfloat16)
    if reason is None:
        interpreted = [case for case in cases if case.rank <= 32]
        found.append(Job("triton, interpreted", Subject("triton", device), interpreted, repeats=2))
    else:
        untested.append(f"triton on the CPU: not tested: {reason}")
    return found, untested


def _modest_cases() -> Iterator[Case]:
    """All forms, dtypes and layouts, but for sizes that only tiles know the difference of."""
    for case in all_cases((32, 129)):
        if not case.kind.startswith("even") and (case.rank <= 32 or case.kind == "ragged"):
            yield case
