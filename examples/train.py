"""Fine-tunes a small network with and without the rotation penalty, and shows what each forgets.

    python examples/train.py [--steps 300] [--coeff 1.0] [--rank 16] [--device cpu]

A network is pretrained on one set of labelled points, then fine-tuned on other points of another labelling. Printed are
the losses on both, and the penalty R. The numbers are a toy's: they show the calls, not what RPSFT is worth.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import rpsft_kernels as rk

FEATURES, CLASSES = 64, 10


def make_points(seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Make points (2048, FEATURES) and their classes (2048,): the largest of CLASSES random projections."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(2048, FEATURES, generator=generator)
    labels = (points @ torch.randn(FEATURES, CLASSES, generator=generator)).argmax(dim=1)
    return points.to(device), labels.to(device)


def train(
    model: nn.Module,
    points: Tensor,
    labels: Tensor,
    *,
    steps: int,
    lr: float,
    anchors: rk.Anchors | None = None,
    coeff: float = 0.0,
) -> None:
    """Train the model; with ``anchors`` and ``coeff`` the rotation penalty is part of the objective."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for _ in range(steps):
        batch = torch.randint(len(points), (128,), device=points.device)
        functional.cross_entropy(model(points[batch]), labels[batch]).backward()
        if anchors is not None and coeff:
            # This call comes after the last backward pass of the step, and before clipping.
            rk.accumulate_rotation_grad_(model, anchors, coeff)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def loss(model: nn.Module, points: Tensor, labels: Tensor) -> float:
    return functional.cross_entropy(model(points), labels).item()


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Run the comparison; returns R at the end of each fine-tuning, by name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="steps of each fine-tuning (default: 300)")
    parser.add_argument("--coeff", type=float, default=1.0, help="the paper's lambda (default: 1.0)")
    parser.add_argument("--rank", type=int, default=16, help="k, directions kept of each weight (default: 16)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    device = torch.device(options.device)
    before, task = make_points(1, device), make_points(2, device)

    pretrained = nn.Sequential(nn.Linear(FEATURES, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU())
    pretrained.append(nn.Linear(256, CLASSES)).to(device)
    train(pretrained, *before, steps=500, lr=1e-3)

    # Anchors are made once, before fine-tuning, and kept beside the pretrained model.
    anchors = rk.Anchors.from_model(pretrained, options.rank, progress=False)
    print(anchors.summary())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "anchors.safetensors")
        anchors.save(path)
        # With the pretrained model at hand, load refuses anchors of any other.
        anchors = rk.Anchors.load(path, pretrained, device=device)

    with torch.no_grad():
        penalties = {"pretrained": rk.rotation_penalty(pretrained, anchors).item()}
    print(f"\n{'':<22}{'loss before':>12}{'task loss':>12}{'R':>12}")
    losses = f"{loss(pretrained, *before):>12.3f}{loss(pretrained, *task):>12.3f}"
    print(f"{'pretrained':<22}{losses}{penalties['pretrained']:>12.4g}")
    for name, coeff in (("fine-tuned", 0.0), (f"with {options.coeff:g} * R", options.coeff)):
        model = copy.deepcopy(pretrained)
        train(model, *task, steps=options.steps, lr=1e-3, anchors=anchors, coeff=coeff)
        with torch.no_grad():
            penalties[name] = rk.rotation_penalty(model, anchors).item()
        print(f"{name:<22}{loss(model, *before):>12.3f}{loss(model, *task):>12.3f}{penalties[name]:>12.4g}")
    return penalties


if __name__ == "__main__":
    main()
