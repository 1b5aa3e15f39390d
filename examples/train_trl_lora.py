"""Fine-tunes LoRA adapters with TRL's SFTTrainer, held to a budget of rotation.

    python examples/train_trl_lora.py [--model HuggingFaceTB/SmolLM2-135M] [--steps 60] [--budget 0.01] [--rank 16]

Without ``--model`` a small random Llama stands in for a pretrained one; the default budget is for it, and
docs/first_run.md says how to choose one for another. The penalty is of the weights that the adapters change,
W0 + s B A, under the names that these have without adapters; no matrix as large as a weight is made.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import rpsft_kernels as rk
from rpsft_kernels.integrations.transformers import penalised

WORDS = ["<pad>", "<eos>", *(f"w{i}" for i in range(62))]


def load(name: str | None) -> tuple[Any, Any]:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, **sizes))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return model, PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_examples(count: int) -> Dataset:
    """Make sequences that count upwards from a random word."""
    starts = torch.randint(62, (count,), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_list([{"text": " ".join(f"w{(start + i) % 62}" for i in range(16))} for start in starts])


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last step's logs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None, help="a folder, or a name on the hub (default: a small random Llama)")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--budget", type=float, default=0.01, help="relative rotation to stay at (default: 0.01)")
    parser.add_argument("--rank", type=int, default=16, help="k, directions kept of each weight (default: 16)")
    options = parser.parse_args(arguments)

    model, tokenizer = load(options.model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = penalised(SFTTrainer)(
            model=model,
            args=SFTConfig(
                output_dir=folder,
                max_steps=options.steps,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=2,
                learning_rate=1e-2,
                logging_steps=10,
                save_strategy="no",
                report_to=[],
                # Only for the numbers to be those of the tests, wherever they run.
                use_cpu=options.model is None,
                bf16=options.model is not None,
            ),
            train_dataset=make_examples(8 * options.steps),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
            rotation=rk.RotationPenalty(options.rank, budget=options.budget),
        )
        trainer.train()
    last: dict[str, float] = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    print({name: round(value, 5) for name, value in last.items()})
    return last


if __name__ == "__main__":
    main()
