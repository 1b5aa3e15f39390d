"""All cases on one subject: what was wrong, and on the kernels which of them were launched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..triton.device import Profile, device_profile
from ..triton.launch import watch_launches
from ..triton.tile_table import rank_classes
from ..triton.variants import ARGUMENTS, Variant, list_variants
from .cases import REPEATED, Case
from .checks import Found, Subject, call_once, check_numbers, check_repeats

REPEATS = 20
# Tiles that each resident program gets in a repeated launch, so that one follows another.
_TILES = 2
# On the CPU nothing has to be filled.
_MODEST_COPIES = 3


@dataclass
class Line:
    """What the table says of one group of cases. ``worst``: of the errors, in the units of ``bound``."""

    cases: int = 0
    worst: float = 0.0
    bound: float = 0.0
    repeats: int = 0
    failures: int = 0

    def add(self, found: Found) -> None:
        self.worst, self.bound = max(self.worst, found.worst), max(self.bound, found.bound)
        self.repeats += found.repeats
        self.failures += len(found.failures)


@dataclass
class Result:
    """A run. ``kernels``: how many variants were compared, and repeated, of how many that the device has (None where
    there are no kernels); ``absent``: those that this installation has not, and why; ``notes``: what else was not run.
    """

    subject: Subject
    lines: dict[tuple[str, ...], Line] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    kernels: tuple[int, int, int] | None = None
    absent: dict[Variant, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures


class Launches:
    """Watches the launches of a run."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.compared: set[Variant] = set()
        self.repeated: set[Variant] = set()
        self.absent: dict[Variant, str] = {}
        # Of the launches since it was last cleared: the most tiles of one.
        self.tiles: dict[Variant, int] = {}

    def on_launch(self, variant: Variant, programs: int, arguments: Sequence[Tensor]) -> None:
        named = dict(zip(ARGUMENTS[variant.kernel], arguments, strict=True))
        tiles = named["order"].numel() if "order" in named else programs
        self.tiles[variant] = max(self.tiles.get(variant, 0), tiles)

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        self.absent[variant] = str(error)

    def named(self, found: Found) -> Found:
        """With the kernels that were launched, where something was wrong."""
        kernels = "; ".join(variant.label() for variant in self.tiles)
        found.failures = [f"{failure}; launched were {kernels}" for failure in found.failures]
        return found

    def filled(self, variant: Variant) -> int:
        """Tiles of a launch that gives every program that the device runs at a time several."""
        # One program adds up each weight's slots: there is nothing to fill.
        return 1 if variant.kernel == "squares" else _TILES * self.profile.multiprocessors * variant.blocks_per_sm


def run(
    subject: Subject,
    cases: Iterable[Case],
    complete: bool,
    repeats: int = REPEATS,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Run cases.

    Args:
        subject: the backend and its device.
        cases: those to run.
        complete: whether the cases are to launch every kernel that the device may be asked for; those that were not
            compared, or not repeated at a size that fills the device, are failures then.
        repeats: calls that must give the same bits.
        progress: told the number of cases that are done.
    """
    began = time.monotonic()
    result = Result(subject)
    profile = device_profile(subject.device) if subject.backend == "triton" else None
    launches = None if profile is None else Launches(profile)
    for number, case in enumerate(cases):
        line = result.lines.setdefault(case.group, Line())
        line.cases += 1
        try:
            for found in _both(case, subject, launches, repeats):
                line.add(found)
                result.failures += found.failures
        except Exception as error:
            if launches is not None and str(error) in launches.absent.values():
                continue
            line.failures += 1
            result.failures.append(f"{case}: {type(error).__name__}: {error}")
            if subject.device.type == "cuda":
                # Whatever a GPU's program broke, nothing that comes after it can be trusted.
                result.notes.append("the cases after this one were not run")
                break
        if progress is not None:
            progress(number + 1)
    if launches is not None:
        _account(result, launches, complete)
    result.seconds = time.monotonic() - began
    return result


def _both(case: Case, subject: Subject, launches: Launches | None, repeats: int) -> Iterable[Found]:
    shape = case.large(subject.device.type == "cuda")
    if launches is None:
        yield check_numbers(case, subject)
        yield check_repeats(case, subject, shape, _MODEST_COPIES, repeats)
        return
    with watch_launches(launches):
        launches.tiles.clear()
        yield launches.named(check_numbers(case, subject))
        launches.compared |= launches.tiles.keys()
        if case.kind not in REPEATED:
            return
        launches.tiles.clear()
        call_once(case, subject, shape)
        wanted = [variant for variant in launches.tiles if variant not in launches.repeated]
        if not wanted:
            return
        copies = max(-(-launches.filled(variant) // launches.tiles[variant]) for variant in wanted)
        yield launches.named(check_repeats(case, subject, shape, copies, repeats))
        launches.repeated |= {v for v, tiles in launches.tiles.items() if tiles >= launches.filled(v)}
        launches.compared |= launches.tiles.keys()


def _account(result: Result, launches: Launches, complete: bool) -> None:
    profile = launches.profile
    listed = list(list_variants(profile.architecture, profile.descriptors, rank_classes()))
    result.absent = launches.absent
    if not complete:
        result.kernels = len(launches.compared), len(launches.repeated), len(launches.compared)
        return
    result.kernels = len(launches.compared), len(launches.repeated), len(listed)
    for variant in listed:
        if variant in launches.absent or (variant in launches.compared and variant in launches.repeated):
            continue
        what = (
            "was launched, but not at a size that fills the device"
            if variant in launches.compared
            else "was never launched"
        )
        if launches.absent:
            # What comes after a kernel that is not there is not reached.
            result.notes.append(f"{variant.label()} {what}: what is launched before it is absent")
        else:
            result.failures.append(f"{variant.label()} {what}: the self-test is not complete")
    for variant in (launches.compared | launches.absent.keys()).difference(listed):
        result.failures.append(f"{variant.label()}: is asked for, but is not on the list of kernels")
