"""Adds the rotation penalty to a loop of Accelerate, of a model that it shards with FSDP2.

    torchrun --standalone --nproc-per-node 2 examples/train_accelerate_fsdp2.py [--steps 40] [--coeff 1.0] [--rank 16]

Accelerate shards over GPUs alone: on CPUs the same loop runs under DDP. A small random Llama stands in for a pretrained
model; the text is made up.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import rpsft_kernels as rk
from rpsft_kernels.integrations.accelerate import attach

VOCABULARY = 64


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last step's metrics, the same on every rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--coeff", type=float, default=1.0, help="the paper's lambda (default: 1.0)")
    parser.add_argument("--rank", type=int, default=16, help="k, directions kept of each weight (default: 16)")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)
    # Sequences that count upwards from a random token.
    tokens = (torch.randint(VOCABULARY, (16 * options.steps, 1)) + torch.arange(16)) % VOCABULARY
    data = DataLoader([{"input_ids": row, "labels": row} for row in tokens], batch_size=4)  # type: ignore[arg-type]

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        cpu_ram_efficient_loading=False,
    )
    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    penalty = rk.RotationPenalty(options.rank, options.coeff)
    # Anchors the sharded model, each rank its own rows; a run that is resumed loads its state after this.
    attach(accelerator, penalty, model)

    for step, batch in enumerate(data):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 19:
            accelerator.print(f"step {penalty.step:4}  loss {loss.item():.3f}  R {penalty.metrics()['rotation/R']:.4g}")
    accelerator.end_training()
    return penalty.metrics()


if __name__ == "__main__":
    main()
