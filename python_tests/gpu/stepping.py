"""Models and steps for tests of how a step is queued, not of what it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import rpsft_kernels as rk

SHAPES = [(512, 264), (264, 512), (96, 40), (1000, 72), (24, 640)]
RANK = 24
CALLS = ["accumulate", "differentiate"]
FORMS = ["base", "block", "full"]
BACKENDS = ["triton", "torch"]


class Model(nn.Module):
    """Wide, tall and small weights, the second of them frozen; moved from their anchors."""

    def __init__(self, form: str, dtype: torch.dtype, device: torch.device, backend: str) -> None:
        super().__init__()
        self.backend = backend
        pretrained = [0.2 * torch.randn(shape, device=device, dtype=dtype) for shape in SHAPES]
        rank = 512 if form == "full" else RANK
        with rk.use_backend(backend):
            made = [rk.Anchor.from_weight(weight, rank, keep_base=form != "block") for weight in pretrained]
        self.anchors = {f"weight{i}": anchor for i, anchor in enumerate(made)}
        for i, weight in enumerate(pretrained):
            moved = (weight + 0.01 * torch.randn_like(weight)).to(dtype)
            self.register_parameter(f"weight{i}", nn.Parameter(moved, requires_grad=i != 1))

    def trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def give_gradients(self) -> None:
        for parameter in self.trained():
            parameter.grad = torch.zeros_like(parameter)

    def gradients(self) -> list[Tensor]:
        return [parameter.grad.clone() for parameter in self.trained() if parameter.grad is not None]

    def step(self, call: str, coeff: float = 0.7) -> Tensor:
        """R, and coeff * dR/dW added to the gradients."""
        with rk.use_backend(self.backend):
            if call == "accumulate":
                return rk.accumulate_rotation_grad_(self, self.anchors, coeff)
            penalty = rk.rotation_penalty(self, self.anchors)
            (coeff * penalty).backward()
            return penalty.detach()

    @torch.no_grad()
    def move(self) -> None:
        """Another weight in the place of each."""
        for parameter in self.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
