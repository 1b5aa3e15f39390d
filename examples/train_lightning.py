"""Fine-tunes a small network with Lightning, held to a budget of rotation by a projection after each step.

    python examples/train_lightning.py [--steps 100] [--budget 0.02] [--rank 8]

Random points stand in for a task.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import rpsft_kernels as rk
from rpsft_kernels.integrations.lightning import RotationPenaltyCallback

FEATURES, CLASSES = 64, 10


class Network(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(FEATURES, 128), nn.ReLU(), nn.Linear(128, CLASSES))

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        points, labels = batch
        loss = functional.cross_entropy(self.layers(points), labels)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.0)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train; returns the last step's metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--budget", type=float, default=0.02, help="relative rotation not to exceed (default: 0.02)")
    parser.add_argument("--rank", type=int, default=8, help="k, directions kept of each weight (default: 8)")
    options = parser.parse_args(arguments)

    points = torch.randn(2048, FEATURES, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(points, points[:, :CLASSES].argmax(dim=1)), batch_size=64)
    penalty = rk.RotationPenalty(options.rank, mode="project", budget=options.budget)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        callbacks=[RotationPenaltyCallback(penalty)],
        gradient_clip_val=1.0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Network(), data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    print({name: round(value, 5) for name, value in found.items()})
    return found


if __name__ == "__main__":
    main()
