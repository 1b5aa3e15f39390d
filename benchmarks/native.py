"""The CPU engine against torch.mm and the published formula: time and memory of one layer's penalty and gradient.

python benchmarks/native.py [--models qwen2.5-0.5b llama-3.2-1b] [--ranks 128 384] [--repeats 7] [--dtype bfloat16]
    [--threads N] [--backend native] [--skip-fp16] [--skip-memory]

Every figure to quote is a ratio within one run. The weights are the seven projections of a layer, with gradients that
exist already; all providers take turns, on two layers in alternation so that no input is in cache from the turn before.
Ends with status 1 if a gradient of this package is off by more than 0.02 (that provider is then not timed).
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from native_case import FP16, GEMM, RELATIVE_DRIFT, Layer, Step, extra_bytes, ours, providers

from rpsft_kernels import ops
from rpsft_kernels.models import MODELS
from rpsft_kernels.ops import native

MAX_ERROR = 0.02
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Result:
    """One provider's figures.

    Attributes:
        seconds: of each round; of its only run for float16; empty where it was not run or not timed.
        error: worst relative error of a single weight's gradient against float64; None where there is none.
        extra: peak bytes beyond weights, anchors and gradients; None where not measured.
    """

    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    extra: int | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Case:
    """One model's layer at one rank, measured; the results in the order of the providers."""

    model: str
    rank: int
    flops: int
    full: int
    results: dict[str, Result]

    def against(self, name: str, reference: str) -> list[float]:
        """``name``'s time over ``reference``'s, round by round: what else the machine does hits both alike."""
        times, references = self.results[name].seconds, self.results[reference].seconds
        if len(times) != len(references):
            # float16 ran once.
            references = [statistics.median(references)] * len(times) if references else []
        return [a / b for a, b in zip(times, references, strict=True)] if references else []


def timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def measure(model: str, rank: int, arguments: argparse.Namespace) -> Case:
    dtype, shapes = _DTYPES[arguments.dtype], MODELS[model].layer()
    layers = [Layer(shapes, rank, dtype, seed) for seed in range(2)]
    results: dict[str, Result] = {}
    steps: dict[str, list[Step]] = {}
    mine = ours(arguments.backend)
    for name, provider in providers(arguments.backend).items():
        result = results[name] = Result()
        if name == FP16 and arguments.skip_fp16:
            continue
        turns = [provider(layer) for layer in (layers[:1] if name == FP16 else layers)]
        # The run whose gradient is checked is the warm-up too, and float16's only run.
        layers[0].clear_gradients()
        first = timed(turns[0])
        if name != GEMM:
            result.error = layers[0].worst_gradient_error(whole=name in mine)
        if name == FP16:
            result.seconds.append(first)
        elif name not in mine or (result.error is not None and result.error <= MAX_ERROR):
            turns[1]()
            steps[name] = turns
    turn = 0
    order = list(steps)
    for _ in range(arguments.repeats):
        for name in order:
            results[name].seconds.append(timed(steps[name][turn % 2]))
            turn += 1
        # Nobody always follows the same provider, nor always meets the same layer.
        order = order[1:] + order[:1]
    if not arguments.skip_memory:
        for name, result in results.items():
            if name in (GEMM, FP16):
                continue
            # A process of its own, and not a fork: threads of OpenMP do not survive one.
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                threads = torch.get_num_threads()
                result.extra = pool.submit(extra_bytes, name, arguments.backend, shapes, rank, dtype, threads).result()
    return Case(model, rank, layers[0].necessary_flops, sum(layers[0].is_full), results)


def _spread(values: Sequence[float], digits: int) -> str:
    middle = f"{statistics.median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _ratio(values: Sequence[float], spread: bool = True) -> str:
    if not values:
        return "-"
    digits = 1 if statistics.median(values) >= 10 else 2
    return _spread(values, digits) if spread else f"{statistics.median(values):.{digits}f}"


def _memory_ratio(case: Case, name: str, reference: str) -> str:
    extra, base = case.results[name].extra, case.results[reference].extra
    return f"{extra / base:.2f}" if extra is not None and base else "-"


def table(case: Case, backend: str) -> str:
    """Every provider of one case, in Markdown."""
    reference = next(iter(ours(backend)))
    rows = [
        f"### {case.model}, rank {case.rank}\n",
        f"{case.flops / 1e9:.2f} necessary GFLOP (4mnk + 4k^2 min(m, n)); {case.full} of 7 anchors are full\n",
        "| provider | ms: median (min..max) | necessary GFLOP/s | share of gemm rate | time / ours "
        "| worst gradient error | extra memory, MiB | memory / ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in case.results.items():
        error = "-" if result.error is None else f"{result.error:.2g}"
        extra = "-" if result.extra is None else f"{result.extra / 2**20:.1f}"
        if result.seconds:
            times = _spread([1e3 * seconds for seconds in result.seconds], 1)
            rate = f"{case.flops / result.median / 1e9:.1f}"
            # The flops are the same, so the share of the rate is the ratio of the times.
            share = _ratio([1 / ratio for ratio in case.against(name, GEMM)])
        else:
            times = "not run" if result.error is None else f"not timed: error above {MAX_ERROR}"
            rate = share = "-"
        ratio = _ratio(case.against(name, reference))
        memory = _memory_ratio(case, name, reference)
        rows.append(f"| {name} | {times} | {rate} | {share} | {ratio} | {error} | {extra} | {memory} |")
    return "\n".join(rows)


def summary(cases: Sequence[Case], backend: str) -> str:
    """One row per case: each provider's median time and memory over ours."""
    reference = next(iter(ours(backend)))
    others = [name for name in providers(backend) if name not in (reference, GEMM)]
    remembered = [name for name in others if name != FP16]
    header = [f"{reference}: share of gemm rate", *(f"{name}: time / ours" for name in others)]
    header += [f"{name}: memory / ours" for name in remembered]
    rows = [f"| model | rank | {' | '.join(header)} |", "|---" * (len(header) + 2) + "|"]
    for case in cases:
        cells = [_ratio([1 / ratio for ratio in case.against(reference, GEMM)], spread=False)]
        for name in others:
            skipped = not case.results[name].seconds and case.results[name].error is None
            cells.append("not run" if skipped else _ratio(case.against(name, reference), spread=False))
        cells += [_memory_ratio(case, name, reference) for name in remembered]
        rows.append(f"| {case.model} | {case.rank} | {' | '.join(cells)} |")
    return "\n".join(rows)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def instruction_set() -> str:
    try:
        return native.instruction_set()
    except ValueError:
        return "not built"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time and memory of the CPU engine, as ratios within one run.")
    parser.add_argument("--models", nargs="+", default=["qwen2.5-0.5b", "llama-3.2-1b"], choices=MODELS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 384], metavar="K")
    parser.add_argument("--repeats", type=int, default=7, help="rounds in which every provider runs once")
    parser.add_argument("--dtype", default="bfloat16", choices=_DTYPES, help="of weights and gradients")
    parser.add_argument("--threads", type=int, help="of torch and the engine; torch's own choice by default")
    parser.add_argument("--backend", default="native", choices=["native", "torch"], help="what counts as ours")
    parser.add_argument(
        "--skip-fp16", action="store_true", help="leave out the published float16 products, slow on a CPU"
    )
    parser.add_argument("--skip-memory", action="store_true", help="measure times only")
    arguments = parser.parse_args(argv)
    for option, value in (("--repeats", arguments.repeats), ("--ranks", min(arguments.ranks))):
        if value < 1:
            parser.error(f"{option}: got {value}, expected at least 1")
    if arguments.threads is not None:
        if arguments.threads < 1:
            parser.error(f"--threads: got {arguments.threads}, expected at least 1")
        torch.set_num_threads(arguments.threads)
    try:
        ops.resolve_backend(torch.device("cpu"), _DTYPES[arguments.dtype], arguments.backend)
    except ValueError as error:
        parser.error(f"--backend: {error}")

    command = shlex.join(["python", *sys.orig_argv[1:]] if argv is None else ["benchmarks/native.py", *argv])
    print(f"`{command}`\n")
    print(
        f"{processor()}, {os.cpu_count()} processors, {torch.get_num_threads()} threads; torch {torch.__version__} "
        f"({torch.backends.cpu.get_cpu_capability()}); native instruction set: {instruction_set()}; "
        f"load before the run: {os.getloadavg()[0]:.1f}"
    )
    print(f"{arguments.dtype} weights and gradients, relative drift {RELATIVE_DRIFT}, {arguments.repeats} rounds")
    cases = []
    for model in arguments.models:
        for rank in arguments.ranks:
            cases.append(measure(model, rank, arguments))
            print(f"\n{table(cases[-1], arguments.backend)}", flush=True)
    print(f"\n### Summary (medians)\n\n{summary(cases, arguments.backend)}")
    wrong = [
        f"{case.model}, rank {case.rank}, {name}: gradient error {off}"
        for case in cases
        for name in ours(arguments.backend)
        # Written so that NaN is wrong.
        if (off := case.results[name].error) is not None and not off <= MAX_ERROR
    ]
    if wrong:
        print(f"\nGradients off by more than {MAX_ERROR}:\n" + "\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
