"""Measures providers: correctness first, then rounds in which all of them take turns.

A provider that is wrong is reported with its error and never timed. In a round every provider runs once; the order
rotates from round to round, layers alternate and the caches are overwritten before each turn, so that none finds its
input where another left it. Other load of the machine hits all providers of a round alike: figures to quote are ratios
round by round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from multiprocessing import get_context
from typing import Any, Protocol

import torch

from benchmarks.reporting.results import Result, Role, Status
from benchmarks.suites import memory
from benchmarks.suites.cases import BenchCase
from benchmarks.suites.layer import Layer
from benchmarks.suites.providers import Provider, Step

# The fixture of the suites: it times a case, records it and fails where this package is wrong.
RunCase = Callable[[BenchCase, list["Entrant"]], list[Result]]

# More than the last-level caches of CPUs and GPUs hold.
_FLUSH_BYTES = {"cpu": 128 << 20, "cuda": 256 << 20}
_HOST_RUNS = 5


@dataclass
class Entrant:
    """One provider in one case. Fields that a :class:`Result` has too are copied to it.

    Attributes:
        steps: one for each copy of the layer; empty unless the provider is to be timed.
        step_seconds: approximate duration of a step, from the run that is checked.
    """

    provider: str
    role: Role
    error_bound: float | None = None
    status: Status = "timed"
    why: str = ""
    steps: list[Step] = field(default_factory=list)
    step_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    flops: int = 0
    bytes: int = 0
    drift: float = 0.0
    error: float | None = None
    penalty_at_anchor: float | None = None
    extra_bytes: int | None = None
    launches: int | None = None
    host_seconds: float | None = None
    energy: float | None = None

    def reject(self, status: Status, why: str) -> None:
        """Leave the entrant out of the timing, for the reason ``why``."""
        self.status, self.why, self.steps = status, why, []

    def result_fields(self) -> dict[str, Any]:
        """Return the fields of a :class:`Result` that this entrant has, by name."""
        shared = {field.name for field in fields(Result)} & {field.name for field in fields(Entrant)}
        return {name: getattr(self, name) for name in shared} | {"seconds": tuple(self.seconds)}


# -- time ------------------------------------------------------------------------------------------------------


class Clock:
    """Measures a step's seconds on a device: by events on a GPU, by the monotonic clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._scratch = torch.empty(_FLUSH_BYTES[device.type], dtype=torch.uint8, device=device)
        self._product_rates: dict[torch.dtype, float] = {}

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Overwrite the contents of the caches."""
        self._scratch.fill_(1)
        # Work that is queued before a step would hide the duration of its launches.
        self.synchronize()

    def seconds(self, step: Step) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def host_seconds(self, step: Step) -> float | None:
        """Measure until a step returns, without waiting for the GPU; None on a CPU, which works within the step."""
        if self.device.type != "cuda":
            return None
        times = []
        for _ in range(_HOST_RUNS):
            self.synchronize()
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        self.synchronize()
        return statistics.median(times)

    def product_rate(self, dtype: torch.dtype) -> float:
        """Measure, once for each dtype, the operations per second of a projection of 512 x 512 elements."""
        if dtype not in self._product_rates:
            left = torch.ones(512, 64, dtype=dtype, device=self.device)
            weight = torch.ones(512, 512, dtype=dtype, device=self.device)
            best = min(self.seconds(lambda: left.T @ weight) for _ in range(2))
            self._product_rates[dtype] = 2 * weight.numel() * left.shape[1] / best
        return self._product_rates[dtype]


class Rounds:
    """The turns of all entrants that have steps, interleaved; each appends to its entrant's ``seconds``.

    Round r begins with entrant r (modulo their number). An entrant runs its copies in alternation. One that is slow
    takes part in as many of the first rounds as its budget has room for, so that entry i is round i's for everyone.

    Args:
        rounds: number of rounds of the fastest entrant.
        budget: seconds for all turns of one entrant.
    """

    def __init__(self, entrants: Sequence[Entrant], clock: Clock, rounds: int, budget: float) -> None:
        self._clock = clock
        self.entrants = [entrant for entrant in entrants if entrant.steps]
        self._turns = list(self._schedule(rounds, budget))
        self._next = 0

    def _schedule(self, rounds: int, budget: float) -> Iterable[tuple[Entrant, Step]]:
        count = len(self.entrants)
        for turn in range(rounds):
            for position in range(count):
                index = (turn + position) % count
                entrant = self.entrants[index]
                if turn < max(1, min(rounds, int(budget / max(entrant.step_seconds, 1e-9)))):
                    yield entrant, entrant.steps[(turn + index) % len(entrant.steps)]

    def count(self, entrant: Entrant) -> int:
        """Count the turns that are left for an entrant."""
        return sum(other is entrant for other, _ in self._turns[self._next :])

    def prepare(self, entrant: Entrant) -> None:
        """Run all turns before the next one of ``entrant``, and flush the caches for that one."""
        while self._next < len(self._turns) and self._turns[self._next][0] is not entrant:
            self._clock.flush()
            self.turn()
        self._clock.flush()

    def turn(self) -> None:
        """Run the next turn, with the caches as they are."""
        entrant, step = self._turns[self._next]
        self._next += 1
        entrant.seconds.append(self._clock.seconds(step))

    def finish(self) -> None:
        """Run the turns that are left."""
        while self._next < len(self._turns):
            self._clock.flush()
            self.turn()


# -- correctness -----------------------------------------------------------------------------------------------


def check(provider: Provider, layer: Layer, step: Step, entrant: Entrant, clock: Clock) -> None:
    """Measure the step's penalty at the anchor and its gradient's error; reject an entrant that is wrong.

    An error above the provider's bound is wrong; so is a penalty of this package that is not exactly 0 at the anchor.
    """
    if provider.has_gradient:
        with layer.at_anchor():
            penalty = step()
        entrant.penalty_at_anchor = None if penalty is None else float(penalty)
    clock.synchronize()
    start = time.perf_counter()
    step()
    clock.synchronize()
    entrant.step_seconds = time.perf_counter() - start
    if not provider.has_gradient:
        return
    entrant.error = layer.worst_gradient_error()
    layer.clear_gradients()
    # The comparison is written so that NaN is wrong.
    if provider.bound is not None and not entrant.error <= provider.bound:
        entrant.reject("wrong", f"gradient error {entrant.error:.2g}, expected at most {provider.bound}")
    elif provider.role == "ours" and entrant.penalty_at_anchor != 0.0:
        entrant.reject("wrong", f"penalty {entrant.penalty_at_anchor} at the anchor, expected exactly 0")


def _enter_provider(provider: Provider, layers: Sequence[Layer], case: BenchCase, clock: Clock) -> Entrant:
    """Make the provider's entrant: checked and warm, or rejected."""
    entrant = Entrant(provider.name, provider.role, provider.bound, drift=layers[0].drift)
    entrant.flops = layers[0].necessary_flops
    entrant.bytes = layers[0].necessary_bytes(provider.reads_base)
    why_not = provider.why_not or _too_slow(provider, entrant.flops, case.patience, clock)
    if why_not:
        entrant.reject("not run", why_not)
        return entrant
    try:
        # All steps are made before the first run, so that a compiled step is compiled once for all copies.
        entrant.steps = [provider(layer) for layer in layers]
        check(provider, layers[0], entrant.steps[0], entrant, clock)
        for layer, step in zip(layers[1:], entrant.steps[1:], strict=False):
            step()
            layer.clear_gradients()
        if entrant.steps and case.memory:
            entrant.extra_bytes = _extra_bytes(provider, entrant.steps[0], case, clock)
        if entrant.steps:
            entrant.launches = count_launches(entrant.steps[0], clock.device)
            entrant.host_seconds = clock.host_seconds(entrant.steps[0])
    except torch.OutOfMemoryError:
        entrant.reject("not run", "out of memory")
    # A provider that fails must not cost the figures of the others. If it is ours, the run ends with a red status.
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        status: Status = "wrong" if provider.role == "ours" else "not run"
        entrant.reject(status, f"{type(error).__name__}: {lines[0][:300]}")
    for layer in layers:
        layer.clear_gradients()
    return entrant


def enter(case: BenchCase, providers: Sequence[Provider], clock: Clock) -> list[Entrant]:
    """Make the case's entrants in the order of the providers; those without steps are not timed."""
    gc.collect()
    if clock.device.type == "cuda":
        torch.cuda.empty_cache()
    layers = [Layer(case.shapes, case.rank, case.dtype, seed, clock.device) for seed in range(case.copies)]
    return [_enter_provider(provider, layers, case, clock) for provider in providers if case.takes(provider.name)]


def _too_slow(provider: Provider, flops: int, patience: float, clock: Clock) -> str:
    """Say why the provider is not run, where a step would take longer than ``patience`` seconds; else ""."""
    if provider.products is None or clock.device.type != "cpu":
        return ""
    rate = clock.product_rate(provider.products)
    name = str(provider.products).removeprefix("torch.")
    if flops / rate <= patience:
        return ""
    return f"a step would take about {flops / rate:.0f} s: {name} products run at {rate / 1e9:.1f} GFLOP/s here"


# -- memory and launches -----------------------------------------------------------------------------------------


def _extra_bytes(provider: Provider, step: Step, case: BenchCase, clock: Clock) -> int | None:
    """Measure a step's peak memory beyond weights, anchors and gradients; None where that is not possible."""
    if not provider.has_gradient:
        return None
    if clock.device.type == "cuda":
        clock.synchronize()
        torch.cuda.reset_peak_memory_stats(clock.device)
        before = torch.cuda.memory_allocated(clock.device)
        step()
        clock.synchronize()
        return int(torch.cuda.max_memory_allocated(clock.device)) - before
    if not memory.is_supported():
        return None
    # The process is not forked, because OpenMP's threads do not survive a fork.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        measurement = pool.submit(
            memory.measure_extra_bytes, provider.name, case.shapes, case.rank, case.dtype, torch.get_num_threads()
        )
        return measurement.result()


class _Event(Protocol):
    key: str
    count: int
    device_type: object


def count_kernels(events: Iterable[_Event]) -> int:
    """Count the kernels in the averaged events of a profile, without copies and annotations."""
    return sum(
        event.count
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not event.key.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    )


def count_launches(step: Step, device: torch.device) -> int | None:
    """Count the kernels that a step launches; None on a CPU."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize(device)
    return count_kernels(profiler.key_averages())


# -- results -----------------------------------------------------------------------------------------------------


def collect_results(case: BenchCase, entrants: Sequence[Entrant]) -> list[Result]:
    """Make a result of each entrant, in their order."""
    return [
        Result(
            suite=case.suite,
            case=case.name,
            model=case.model,
            rank=case.rank,
            dtype=case.dtype_name,
            weights=len(case.shapes),
            elements=case.elements,
            axis=case.axis,
            x=case.x,
            **entrant.result_fields(),
        )
        for entrant in entrants
    ]


def run(
    case: BenchCase, entrants: Sequence[Entrant], clock: Clock, around: Callable[[Rounds], None] | None = None
) -> list[Result]:
    """Time the entrants and return their results; ``around`` may run some turns itself, before the others."""
    rounds = Rounds(entrants, clock, case.rounds, case.budget)
    if around is not None and rounds.entrants:
        around(rounds)
    rounds.finish()
    return collect_results(case, entrants)


def describe_wrong(results: Sequence[Result]) -> list[str]:
    """Describe the results of this package that are wrong."""
    return [
        f"{result.suite}, {result.case}, {result.provider}: {result.why}"
        for result in results
        if result.role == "ours" and result.status == "wrong"
    ]
