"""A small Llama from transformers, its anchors, and the right penalty and gradient in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import rpsft_kernels as rk
from small_models import tiny_llama

RANK = 24  # of k and v projections (24, 48) the whole: a full anchor
COEFF = 0.3


def llama(dtype: torch.dtype = torch.float32, intermediate_size: int = 85) -> LlamaForCausalLM:
    """The pretrained model: grouped queries, tied embeddings, sizes that few numbers of ranks divide."""
    model: LlamaForCausalLM = tiny_llama(
        hidden_size=48,
        intermediate_size=intermediate_size,
        vocab_size=101,
        initializer_range=0.1,
        attn_implementation="eager",
    )
    # Its own dtype is exact in bfloat16, as checkpoints are.
    return model.bfloat16().to(dtype)


def whole_anchors(model: nn.Module, **options: Any) -> rk.Anchors:
    return rk.Anchors.from_model(model, RANK, progress=False, **{"basis_dtype": torch.float32, **options})


@torch.no_grad()
def drift(model: nn.Module, scale: float = 0.01) -> None:
    """Move every weight a little, the same on every rank that calls it with a whole model."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(scale * noise.to(parameter.dtype))


def expected(model: nn.Module, anchors: Mapping[str, rk.Anchor]) -> tuple[float, dict[str, Tensor]]:
    """Compute R and dR/dW of a whole model by the definition, in float64."""
    weights, total, gradients = dict(model.named_parameters()), 0.0, {}
    for name, anchor in anchors.items():
        assert anchor.base is not None
        moved = weights[name].detach().double() - anchor.base.double()
        if anchor.left is not None and anchor.right is not None:
            left, right = anchor.left.double(), anchor.right.double()
            projected = left.T @ moved @ right
            gradients[name] = 2 * left @ projected @ right.T
        else:
            projected = moved
            gradients[name] = 2 * moved
        total += float(projected.square().sum())
    return total, gradients


def expected_with(options: dict[str, Any], pretrained: nn.Module, moved: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Compute :func:`expected` of a moved model, for anchors that ``Anchors.from_model`` makes with these options."""
    # In the block form U and V alone decide the penalty.
    kept = {key: value for key, value in options.items() if key != "keep_base"}
    return expected(moved, whole_anchors(pretrained, **kept))


def batch(size: int = 12) -> Tensor:
    return torch.randint(0, 101, (size, 9), generator=torch.Generator().manual_seed(2))


def own_batch() -> Tensor:
    """Return this rank's share of the batch; the mean of the ranks' losses is the whole batch's."""
    return batch().chunk(dist.get_world_size())[dist.get_rank()]


def task_loss(model: Any, tokens: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def errors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the worst relative error of a gradient."""
    assert set(wanted) <= set(found)
    return max(float((found[name].double() - g).norm() / g.norm()) for name, g in wanted.items())


def train_alone(steps: int, accumulate: bool) -> dict[str, Tensor]:
    """Return the parameters after some optimizer steps of the unsharded model on the whole batch."""
    model = llama()
    anchors = whole_anchors(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = task_loss(model, batch())
        if accumulate:
            loss.backward()
            rk.accumulate_rotation_grad_(model, anchors, COEFF)
        else:
            (loss + COEFF * rk.rotation_penalty(model, anchors)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def distance(found: dict[str, Tensor], alone: dict[str, Tensor]) -> float:
    """Return the distance between parameters, relative to their drift."""
    start = dict(llama().named_parameters())
    return max(
        float((found[name] - value).norm() / (value - start[name].detach()).norm()) for name, value in alone.items()
    )
