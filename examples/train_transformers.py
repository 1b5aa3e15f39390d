"""Fine-tunes a causal language model with the Trainer of transformers and the rotation penalty.

    python examples/train_transformers.py [--model HuggingFaceTB/SmolLM2-135M] [--steps 60] [--coeff 1.0] [--rank 16]

Without ``--model`` a small random Llama stands in for a pretrained one; the text is made up. R is in the logs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import rpsft_kernels as rk
from rpsft_kernels.integrations.transformers import penalised

VOCABULARY = 64


def load(name: str | None) -> Any:
    if name is not None:
        # Weights in bfloat16, most checkpoints' own dtype, do not feel small steps.
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))


def make_examples(count: int) -> list[dict[str, torch.Tensor]]:
    """Make sequences that count upwards from a random token."""
    starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(1))
    tokens = (starts + torch.arange(16)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last step's logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, or a name on the hub (default: a small random Llama)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--coeff", type=float, default=1.0, help="the paper's lambda (default: 1.0)")
    parser.add_argument("--rank", type=int, default=16, help="k, directions kept of each weight (default: 16)")
    options = parser.parse_args(arguments)

    with tempfile.TemporaryDirectory() as folder:
        trainer = penalised(Trainer)(
            model=load(options.model),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                # Only for the numbers below to be those of the tests, wherever they run.
                use_cpu=options.model is None,
            ),
            train_dataset=make_examples(8 * options.steps),
            rotation=rk.RotationPenalty(options.rank, options.coeff),
        )
        trainer.train()
    last: dict[str, float] = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    print({name: round(value, 5) for name, value in last.items()})
    return last


if __name__ == "__main__":
    main()
