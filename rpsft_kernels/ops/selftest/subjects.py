"""The runs that a device allows: backends, instruction sets, and the cases for each."""

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
from .cases import RANKS, SelfTestCase, all_cases, quick_cases
from .checks import Subject
from .suite import REPEATS, SelfTestResult, run

# On the CPU every repetition takes as long as the first.
_MODEST_REPEATS = 3


@dataclass(frozen=True)
class SelfTestJob:
    """A run to be made. With ``complete`` its cases launch every kernel of the device. The variables of ``environment``
    are set during the run.
    """

    title: str
    subject: Subject
    cases: list[SelfTestCase]
    complete: bool = False
    repeats: int = REPEATS
    environment: dict[str, str] = field(default_factory=dict)

    def run(self, progress: Callable[[int], None] | None = None) -> SelfTestResult:
        with _reset_modes(self.subject.device), _set_environment(self.environment):
            return run(self.subject, self.cases, self.complete, self.repeats, progress)


@contextmanager
def _reset_modes(device: torch.device) -> Iterator[None]:
    """Leave the caller's modes: no graph is recorded, no inference tensor is made, and nothing is cast."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def _set_environment(variables: dict[str, str]) -> Iterator[None]:
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


def list_jobs(device: torch.device, quick: bool) -> tuple[list[SelfTestJob], list[str]]:
    """List the runs that a device allows, and the backends that cannot be tested there, with the reasons."""
    return _list_gpu_jobs(device, quick) if device.type == "cuda" else _list_cpu_jobs(device, quick)


def run_quick_part(device: torch.device) -> SelfTestResult:
    """Run the part that comes before the first launch on a GPU."""
    # What the program has queued may take as long as it likes, and the test's own launches may not.
    torch.cuda.current_stream(device).synchronize()
    return _triton_job(device, quick=True).run()


def _list_gpu_jobs(device: torch.device, quick: bool) -> tuple[list[SelfTestJob], list[str]]:
    cases = list(quick_cases((32, 129))) if quick else list(_modest_cases())
    name = torch.cuda.get_device_properties(device).name
    plain = SelfTestJob(f"torch on {device}: {name}", Subject("torch", device, bitwise=False), cases, repeats=1)
    reason = load("triton").unavailable(device, torch.bfloat16)
    if reason is not None:
        return [plain], [f"triton on {device}: not tested: {reason}"]
    # The quick part is the one that runs by itself, and tests the kernels alone.
    return [_triton_job(device, quick)] + ([] if quick else [plain]), []


def _triton_job(device: torch.device, quick: bool) -> SelfTestJob:
    profile = device_profile(device)
    own, tuned = own_profile(device).architecture, tuned_architecture()
    ahead = torch.version.hip is None and aot.served_table(device, own, tuned)
    # Compiling takes seconds for each kernel. Where Triton compiles, the rank class of the published rank is enough.
    cases = list(quick_cases(RANKS if ahead else RANKS[-1:])) if quick else list(all_cases())
    name = torch.cuda.get_device_properties(device).name
    code = "compiled ahead of time" if ahead else "compiled by Triton where they are not yet"
    title = f"triton on {device}: {name}, kernels of table {profile.architecture}, {code}"
    return SelfTestJob(title, Subject("triton", device), cases, complete=not quick)


def _list_cpu_jobs(device: torch.device, quick: bool) -> tuple[list[SelfTestJob], list[str]]:
    cases = list(quick_cases((32, 129))) if quick else list(_modest_cases())
    # A library's products may depend on where their operands lie.
    jobs = [SelfTestJob("torch on the CPU", Subject("torch", device, bitwise=False), cases, repeats=1)]
    untested = []
    if native.instruction_sets():
        for name in native.instruction_sets():
            title = f"native on the CPU: instruction set {name}"
            environment = {"RPSFT_ISA": name}
            jobs.append(
                SelfTestJob(title, Subject("native", device), cases, repeats=_MODEST_REPEATS, environment=environment)
            )
    else:
        untested.append(f"native on the CPU: not tested: {native.missing()}")
    reason = load("triton").unavailable(device, torch.bfloat16)
    if reason is None:
        interpreted = [case for case in cases if case.rank <= 32]
        jobs.append(SelfTestJob("triton, interpreted", Subject("triton", device), interpreted, repeats=2))
    else:
        untested.append(f"triton on the CPU: not tested: {reason}")
    return jobs, untested


def _modest_cases() -> Iterator[SelfTestCase]:
    """Make the cases of all forms, dtypes and layouts, but for sizes that differ only for the tiles of GPUs."""
    for case in all_cases((32, 129)):
        if not case.kind.startswith("even") and (case.rank <= 32 or case.kind == "ragged"):
            yield case
