"""All cases on one subject: their failures, and the kernels that were launched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..triton.device import Profile, device_profile
from ..triton.launch import watch_launches
from ..triton.tile_table import rank_classes
from ..triton.variants import ARGUMENTS, SPECIALISED, Variant, list_variants
from ..triton.waiting import Stalled
from .cases import REPEATED, SelfTestCase
from .checks import Findings, Subject, call_once, check_numbers, check_repeats

REPEATS = 20
# A repeated launch gives each resident program so many tiles, so that one follows another.
_TILES = 2
# A CPU computes as well with few weights in a call.
_MODEST_COPIES = 3


@dataclass
class Line:
    """One line of the table: the cases of one operation, form and dtypes. ``worst`` is the largest error, in the units
    of ``bound``.
    """

    cases: int = 0
    worst: float = 0.0
    bound: float = 0.0
    repeats: int = 0
    failures: int = 0

    def add(self, findings: Findings) -> None:
        self.worst, self.bound = max(self.worst, findings.worst), max(self.bound, findings.bound)
        self.repeats += findings.repeats
        self.failures += len(findings.failures)


@dataclass
class SelfTestResult:
    """The result of all cases on one subject.

    Attributes:
        lines: a line of the table for each :attr:`SelfTestCase.line_key`.
        failures: a sentence for each failed check.
        kernels: numbers of variants that were compared, that were repeated, and that the device has; None where the
            subject has no kernels.
        absent: variants that this installation lacks, with the reasons.
        notes: sentences on other cases and kernels that were not run.
        stalled: whether the last failure is a launch that does not end. The process cannot use the GPU any more.
        seconds: duration of the run.
    """

    subject: Subject
    lines: dict[tuple[str, ...], Line] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    kernels: tuple[int, int, int] | None = None
    absent: dict[Variant, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stalled: bool = False
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return not self.failures


class Launches:
    """Records the launches of a run (:class:`rpsft_kernels.ops.triton.launch.Watcher`)."""

    def __init__(self, profile: Profile, settle: Callable[[], None] = lambda: None) -> None:
        self.profile = profile
        self._settle = settle
        self._ended: set[Variant] = set()
        self.compared: set[Variant] = set()
        self.repeated: set[Variant] = set()
        self.absent: dict[Variant, str] = {}
        # The most tiles of one launch of each variant, since the last clear().
        self.tiles: dict[Variant, int] = {}

    def on_launch(self, variant: Variant, programs: int, arguments: Sequence[Tensor]) -> None:
        named = dict(zip(ARGUMENTS[variant.kernel], arguments, strict=True))
        tiles = named["order"].numel() if "order" in named else programs
        self.tiles[variant] = max(self.tiles.get(variant, 0), tiles)
        if variant not in self._ended:
            # The first launch of the next kernel loads its code, and the driver may wait for all before it there.
            try:
                self._settle()
            except Stalled as error:
                raise Stalled(f"{variant.label()} does not end: {error}") from error
            self._ended.add(variant)

    def on_refusal(self, variant: Variant, error: Exception) -> None:
        self.absent[variant] = str(error)

    def name_kernels(self, findings: Findings) -> Findings:
        """Add the kernels that were launched to every failure."""
        kernels = "; ".join(variant.label() for variant in self.tiles)
        findings.failures = [f"{failure}; launched were {kernels}" for failure in findings.failures]
        return findings

    def tiles_to_fill(self, variant: Variant) -> int:
        """Return the tiles of a launch that gives several to every program that the device runs at a time."""
        # Programs of this kernel add up the slots of one weight each, and have no second tile.
        return 1 if variant.kernel == "squares" else _TILES * self.profile.multiprocessors * variant.blocks_per_sm

    def copies_to_fill(self, variants: Iterable[Variant]) -> int:
        """Return how often the last call's weights must be given so that each of these variants has tiles enough."""
        return max(-(-self.tiles_to_fill(variant) // self.tiles[variant]) for variant in variants)


def run(
    subject: Subject,
    cases: Iterable[SelfTestCase],
    complete: bool,
    repeats: int = REPEATS,
    progress: Callable[[int], None] | None = None,
) -> SelfTestResult:
    """Run cases on a subject.

    Args:
        subject: the backend and its device.
        cases: the cases to run.
        complete: True where the cases should launch every kernel that the device may be asked for. A kernel that was
            not compared, or not repeated at a size that fills the device, is a failure then.
        repeats: the number of calls that must give the same bits.
        progress: called after each case with the number of cases that are done.
    """
    start = time.monotonic()
    result = SelfTestResult(subject)
    profile = device_profile(subject.device) if subject.backend == "triton" else None
    launches = None if profile is None else Launches(profile, subject.settle)
    for number, case in enumerate(cases):
        line = result.lines.setdefault(case.line_key, Line())
        line.cases += 1
        try:
            for findings in _check_case(case, subject, launches, repeats):
                line.add(findings)
                result.failures += findings.failures
        except Stalled as error:
            line.failures += 1
            names = "; ".join(variant.label() for variant in launches.tiles) if launches is not None else ""
            launched = f"; launched were {names}" if names else ""
            result.failures.append(f"{case}: {error}{launched}")
            result.notes.append("the cases after this one were not run")
            result.stalled = True
            break
        except Exception as error:
            if launches is not None and str(error) in launches.absent.values():
                continue
            line.failures += 1
            result.failures.append(f"{case}: {type(error).__name__}: {error}")
            if subject.device.type == "cuda":
                # After an error of a GPU's program no later result can be trusted.
                result.notes.append("the cases after this one were not run")
                break
        if progress is not None:
            progress(number + 1)
    if launches is not None:
        # A test that broke off tells of the kernels that it came to.
        _account_for_kernels(result, launches, complete and not result.stalled)
    result.seconds = time.monotonic() - start
    return result


def _check_case(case: SelfTestCase, subject: Subject, launches: Launches | None, repeats: int) -> Iterator[Findings]:
    shape = case.large_shape(subject.device.type == "cuda")
    if launches is None:
        yield check_numbers(case, subject)
        yield check_repeats(case, subject, shape, _MODEST_COPIES, repeats)
        return
    with watch_launches(launches):
        launches.tiles.clear()
        yield launches.name_kernels(check_numbers(case, subject))
        launches.compared |= launches.tiles.keys()
        if case.kind not in REPEATED:
            return
        launches.tiles.clear()
        call_once(case, subject, shape)
        copies = 1
        if case.operation == "drift" and any(variant.kernel in SPECIALISED for variant in launches.tiles):
            # A launch that fills the device may have wider tiles than one of a single weight: another variant.
            copies = launches.copies_to_fill(launches.tiles)
            launches.tiles.clear()
            call_once(case, subject, shape, copies)
        wanted = [variant for variant in launches.tiles if variant not in launches.repeated]
        if not wanted:
            return
        copies *= launches.copies_to_fill(wanted)
        yield launches.name_kernels(check_repeats(case, subject, shape, copies, repeats))
        launches.repeated |= {v for v, tiles in launches.tiles.items() if tiles >= launches.tiles_to_fill(v)}
        launches.compared |= launches.tiles.keys()


def _account_for_kernels(result: SelfTestResult, launches: Launches, complete: bool) -> None:
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
        lack = (
            "was launched, but not at a size that fills the device"
            if variant in launches.compared
            else "was never launched"
        )
        if launches.absent:
            # A call ends at an absent kernel, and does not reach its later launches.
            result.notes.append(f"{variant.label()} {lack}: what is launched before it is absent")
        else:
            result.failures.append(f"{variant.label()} {lack}: the self-test is not complete")
    for variant in (launches.compared | launches.absent.keys()).difference(listed):
        result.failures.append(f"{variant.label()}: is asked for, but is not on the list of kernels")
