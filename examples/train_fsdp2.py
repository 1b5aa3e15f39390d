"""Adds the rotation penalty to the training of a model that FSDP2 shards.

    torchrun --standalone --nproc-per-node 2 examples/train_fsdp2.py [--steps 100] [--coeff 1.0] [--rank 16]

Runs over NCCL where every process has a GPU of its own, else over gloo on the CPU (torch 2.9 or newer: FSDP2 of older
versions does not average gradients there). Nothing about the calls differs from a model in one process.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import rpsft_kernels as rk

FEATURES, CLASSES = 64, 10


def network() -> nn.Sequential:
    """Make a stand-in for a pretrained model, the same on every rank."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers, nn.Linear(FEATURES, CLASSES))


def train(options: argparse.Namespace, device: torch.device) -> float:
    """Fine-tune on random points; returns R after the last step, which is the same number on every rank."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = network().to(device)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # Each rank keeps the anchors of its own rows. save(folder) would write one file per rank.
    anchors = rk.Anchors.from_model(model, options.rank, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)

    torch.manual_seed(1 + dist.get_rank())  # other points on each rank
    penalty = torch.zeros(())
    for step in range(options.steps):
        points = torch.randn(128, FEATURES, device=device)
        labels = points[:, :CLASSES].argmax(dim=1)
        loss = functional.cross_entropy(model(points), labels)
        loss.backward()
        # R of the weights as they are, before the step: 0 at the first.
        penalty = rk.accumulate_rotation_grad_(model, anchors, options.coeff)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 and dist.get_rank() == 0:
            print(f"step {step:4}  loss {loss.item():.3f}  R {penalty.item():.4g}", flush=True)

    with torch.no_grad():
        penalty = rk.rotation_penalty(model, anchors)
    return penalty.item()


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps (default: 100)")
    parser.add_argument("--coeff", type=float, default=1.0, help="the paper's lambda (default: 1.0)")
    parser.add_argument("--rank", type=int, default=16, help="k, directions kept of each weight (default: 16)")
    options = parser.parse_args(arguments)
    local_rank = int(os.environ["LOCAL_RANK"])
    on_gpu = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    penalty = train(options, device)
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: R {penalty!r}", flush=True)
    dist.destroy_process_group()
    return penalty


if __name__ == "__main__":
    main()
