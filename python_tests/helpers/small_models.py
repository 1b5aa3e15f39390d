"""Small models for the tests: a random Llama, plain layers with their loss, and what both calls give at the anchor."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import rpsft_kernels as rk


def tiny_llama(**config: Any) -> Any:
    """A ``LlamaForCausalLM``, random and the same at every call: two layers of width 32, grouped queries and tied
    embeddings, unless ``config`` says otherwise.
    """
    # Here, not above: the models of plain layers need no transformers.
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **config}))


def linear_layers(sizes: tuple[int, ...]) -> nn.Sequential:
    """``nn.Linear`` from each size to the next, with ``nn.Tanh`` between them; the same at every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inner, outer in pairwise(sizes):
        layers += [nn.Linear(inner, outer), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def vectors(size: int) -> Tensor:
    """A batch of 12 inputs of that size."""
    return torch.randn(12, size, generator=torch.Generator().manual_seed(2))


def mean_square(model: Any, inputs: Tensor) -> Tensor:
    """A loss for models that map vectors to vectors."""
    result: Tensor = model(inputs).square().mean()
    return result


def refused(call: Callable[[], object]) -> str:
    """The message of the ValueError that a call raises; "accepted" if it raises none."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "accepted"


def found_at_anchor(
    pretrained: nn.Module, anchors: rk.Anchors, coeff: float, gradients: Callable[[nn.Module], dict[str, Tensor]]
) -> dict[str, Any]:
    """R by both calls on the very model that was anchored, and the largest entry of any gradient that they made. The
    model has no gradients afterwards.
    """
    penalties = [
        rk.rotation_penalty(pretrained, anchors),
        rk.accumulate_rotation_grad_(pretrained, anchors, coeff),
    ]
    largest = max([float(g.abs().max()) for g in gradients(pretrained).values()], default=0.0)
    pretrained.zero_grad()
    return {"at anchor": [p.item() for p in penalties], "gradient at anchor": largest}
