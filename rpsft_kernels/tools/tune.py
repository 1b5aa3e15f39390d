"""Times tile shapes on a GPU, on demand: nothing in the package tunes by itself.

The kernels of all candidates are compiled first, in parallel processes, into Triton's cache. Each phase is then timed
by itself, with the launches of a real plan in which the other phases have the best tiles known so far. Time is limited:
candidates for which none is left are named, not waited for.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from ..ops.triton import device as devices
from ..ops.triton.project_drift import plan_forward
from ..ops.triton.pull_back import plan_backward
from ..ops.triton.tile_table import forget_tuned, rank_class, tile_table
from ..ops.triton.variants import Variant
from ..ops.triton.waiting import Stalled
from .tuning import DEFAULT_BUDGET
from .tuning.candidates import Row, describe_row, list_candidates
from .tuning.compiling import Compile, Compiled, compile_variants
from .tuning.layer import KERNELS_OF, Layer
from .tuning.timer import EventTimer, Timer

# Shares of the budget until which candidates are planned and kernels compiled, and of a phase's time in which all
# candidates are timed once.
_PLAN_SHARE, _COMPILE_SHARE, _FIRST_SHARE = 0.2, 0.55, 0.75
# The fastest candidates are timed again, in turn: clocks drift while a GPU warms up.
_FINALISTS, _FINAL_ROUNDS = 4, 3


def tune(
    shapes: Sequence[tuple[int, int]],
    rank: int,
    device: torch.device,
    candidates: Sequence[Row] | None = None,
    *,
    budget: float = DEFAULT_BUDGET,
    timer: Timer | None = None,
    compile_all: Compile | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Return the device's tile table with the fastest shapes for one layer's weights in bfloat16, base form.

    Args:
        shapes: (m, n) of each weight of one layer.
        rank: k; the rows for its rank class are tuned.
        device: the GPU.
        candidates: rows (without their rank) to try beside the shipped one, in every phase; None: those of each phase.
            A row that does not compile, spills, does not fit or is refused is passed over.
        budget: seconds that all of it may take.
        timer: times a call, in milliseconds (default: by CUDA events).
        compile_all: compiles variants where the launches find them (default: :func:`compile_variants`).
        clock: seconds, from any beginning.

    Returns:
        A table as in ``tiles/``, with the phases that were tuned; :func:`write_table` writes it for RPSFT_TILES.

    Raises:
        RuntimeError: no candidate of any phase could be timed, or the GPU no longer answers.
        Stalled: a candidate's launches do not end. Nothing else can be timed in this process.
    """
    began = clock()
    if device.type == "cuda" and device.index is None:
        # Other processes have another current device.
        device = torch.device("cuda", torch.cuda.current_device())
    # Tune the device's own table, not that of installed kernels: the own one is in force under RPSFT_TILES.
    architecture = devices.own_profile(device).architecture
    table: dict[str, Any] = json.loads(json.dumps(tile_table(architecture)))
    layer = Layer(shapes, rank, device)
    timer = timer or EventTimer(device)
    rows = {phase: _find_row(table, phase, rank) for phase in KERNELS_OF}
    choices: dict[str, list[_Choice]] = {}
    for phase, row in rows.items():
        shipped = {name: value for name, value in row.items() if name != "rank"}
        others = list_candidates(phase, shipped, rank, architecture) if candidates is None else list(candidates)
        with_shipped = [shipped, *(other for other in others if other != shipped)]
        choices[phase] = [_Choice(each) for each in with_shipped]

    def plan(phase: str, choice: _Choice) -> list[Variant]:
        with _in_force(_replace(table, phase, rows[phase], choice.row)):
            return layer.list_variants(phase)

    variants = _plan_choices(choices, plan, lambda: clock() < began + _PLAN_SHARE * budget)
    print(f"compiling {len(variants)} kernels of {sum(map(len, choices.values()))} candidates", flush=True)
    seconds = max(0.0, began + _COMPILE_SHARE * budget - clock())
    compiled = (compile_all or compile_variants)(variants, architecture, device, seconds)
    errors: list[Exception] = []
    for number, (phase, row) in enumerate(rows.items()):
        share = max(0.0, began + budget - clock()) / (len(rows) - number)

        def measure(choice: _Choice, phase: str = phase, row: Row = row) -> None:
            with _in_force(_replace(table, phase, row, choice.row)), layer.open_phase(phase) as launches:
                launches()
                choice.times.append(timer(launches))

        search = _Search(
            phase, choices[phase], measure=measure, compiled=compiled, clock=clock, seconds=share, device=device
        )
        best = search.find()
        if best is None:
            errors += search.errors
            continue
        row_of_best = {"rank": row["rank"], **best.row}
        row.clear()
        row.update(row_of_best)
    if not any(choice.times for each in choices.values() for choice in each):
        raise RuntimeError("device: no candidate of any phase could be timed") from (errors[0] if errors else None)
    return table


def write_table(table: dict[str, Any], path: str | Path) -> None:
    """Write a tile table for the environment variable RPSFT_TILES."""
    Path(path).write_text(json.dumps(table, indent=1) + "\n")


@dataclass
class _Choice:
    """A row to try (without its rank), the variants that its phase launches with it, and the times that it took.

    ``variants`` is None where there was no time to plan.
    """

    row: Row
    variants: list[Variant] | None = None
    times: list[float] = field(default_factory=list)

    @property
    def milliseconds(self) -> float:
        return statistics.median(self.times)


def _plan_choices(
    choices: dict[str, list[_Choice]], plan: Callable[[str, _Choice], list[Variant]], has_time: Callable[[], bool]
) -> list[Variant]:
    """Give the choices of all phases their variants while there is time; returns these, each once.

    The shipped rows come first, whatever time there is, then choice after choice of all phases.
    """
    variants: dict[Variant, None] = {}
    for turn, in_turn in enumerate(zip_longest(*choices.values())):
        for phase, choice in zip(choices, in_turn, strict=True):
            if choice is not None and (turn == 0 or has_time()):
                choice.variants = plan(phase, choice)
                variants.update(dict.fromkeys(choice.variants))
    return list(variants)


class _Search:
    """The search for a phase's fastest choice, which takes ``seconds``. The first choice is the shipped one."""

    def __init__(
        self,
        phase: str,
        choices: list[_Choice],
        measure: Callable[[_Choice], None],
        compiled: Compiled,
        clock: Callable[[], float],
        seconds: float,
        device: torch.device,
    ) -> None:
        self.errors: list[Exception] = []
        self._phase, self._choices, self._measure, self._compiled = phase, choices, measure, compiled
        self._clock, self._device = clock, device
        now = clock()
        self._first_deadline, self._deadline = now + _FIRST_SHARE * seconds, now + seconds
        # Seconds of the longest measurement so far.
        self._longest = 0.0

    def find(self) -> _Choice | None:
        """The fastest choice, the shipped one if nothing is faster; None if none could be timed."""
        shipped = self._choices[0]
        untried = [choice for choice in self._choices if not self._try(choice, choice is shipped)]
        timed = sorted((choice for choice in self._choices if choice.times), key=lambda choice: choice.milliseconds)
        finalists = timed[:_FINALISTS]
        if shipped.times and shipped not in finalists:
            finalists.append(shipped)
        self._repeat(finalists)
        finalists = [choice for choice in finalists if choice.times]
        if untried:
            names = "; ".join(describe_row(choice.row) for choice in untried)
            print(f"{self._phase}: no time for {len(untried)} of {len(self._choices)} candidates: {names}")
        if not finalists:
            print(f"{self._phase}: nothing could be timed; the shipped tiles stay")
            return None
        # The shipped one among equals.
        best = min(finalists, key=lambda choice: (choice.milliseconds, choice is not shipped))
        before = f"{shipped.milliseconds:.3f} ms" if shipped.times else "not timed"
        after = f"{best.milliseconds:.3f} ms with {describe_row(best.row)}"
        print(f"{self._phase}: {before} as shipped, {after}", flush=True)
        return best

    def _try(self, choice: _Choice, is_shipped: bool) -> bool:
        """Time a choice once, or say why not; False if there is no time for it.

        The shipped one is always tried: a kernel compiled ahead of time may serve it, whatever Triton makes of it here.
        """
        if not is_shipped:
            if choice.variants is None:
                return False
            reason = next(filter(None, map(self._compiled.get, choice.variants)), None)
            if reason is not None:
                self._pass_over(choice, reason)
                return True
            if not self._has_time(1, self._first_deadline) or not self._compiled.keys() >= set(choice.variants):
                return False
        self._time(choice)
        return True

    def _repeat(self, finalists: list[_Choice]) -> None:
        for _ in range(_FINAL_ROUNDS):
            # A round is for all of them or none, so that the same conditions count for all.
            if not self._has_time(len(finalists), self._deadline):
                return
            for choice in finalists:
                if choice.times:
                    self._time(choice)

    def _has_time(self, measurements: int, deadline: float) -> bool:
        return self._clock() + measurements * self._longest <= deadline

    def _time(self, choice: _Choice) -> None:
        began = self._clock()
        try:
            self._measure(choice)
        except Stalled as error:
            raise Stalled(
                f"{self._phase}: {describe_row(choice.row)} hangs: {error}; end this process (kill -9 where it does "
                "not end by itself)"
            ) from error
        except Exception as error:  # a shape for which compiler or driver raises is no candidate
            self.errors.append(error)
            choice.times.clear()
            self._pass_over(choice, f"{type(error).__name__}: {error}")
            if self._device.type == "cuda":
                # After some errors a GPU refuses everything; this raises then.
                torch.cuda.synchronize(self._device)
        self._longest = max(self._longest, self._clock() - began)

    def _pass_over(self, choice: _Choice, reason: str) -> None:
        print(f"{self._phase}: passed over {describe_row(choice.row)}: {reason}")


def _find_row(table: dict[str, Any], phase: str, rank: int) -> Row:
    rows: list[Row] = table[phase]["one part"]
    return next(row for row in rows if rank_class(rank) <= row["rank"])


def _replace(table: dict[str, Any], phase: str, row: Row, choice: Row) -> dict[str, Any]:
    """The table with other tiles in one of its own rows."""
    rows = [{"rank": row["rank"], **choice} if each is row else each for each in table[phase]["one part"]]
    return {**table, phase: {**table[phase], "one part": rows}}


@contextmanager
def _in_force(table: dict[str, Any]) -> Iterator[None]:
    """Plan with a tile table inside the ``with`` block."""
    before = os.environ.get("RPSFT_TILES")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        write_table(table, path)
        os.environ["RPSFT_TILES"] = str(path)
        _forget()
        try:
            yield
        finally:
            if before is None:
                del os.environ["RPSFT_TILES"]
            else:
                os.environ["RPSFT_TILES"] = before
            _forget()


def _forget() -> None:
    forget_tuned()
    plan_forward.cache_clear()
    plan_backward.cache_clear()
