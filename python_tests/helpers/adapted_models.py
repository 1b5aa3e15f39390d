"""Small models with PEFT's adapters, and the right penalty of their weights: the dense formula in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import rpsft_kernels as rk
from small_models import tiny_llama

RANK = 16  # of k projections (16, 32) the whole: full anchors
LLAMA = ["q_proj", "k_proj", "down_proj"]


def llama() -> nn.Module:
    return tiny_llama(hidden_size=32, intermediate_size=44, vocab_size=61, initializer_range=0.1)


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_head=2, n_layer=1, vocab_size=61, n_positions=16, initializer_range=0.1)
    )


def adapt(model: nn.Module, targets: Any = LLAMA, **options: Any) -> Any:
    """Put adapters into ``model``, in float64."""
    with warnings.catch_warnings():
        # Of tied embeddings, and of options that PEFT changes by itself.
        warnings.simplefilter("ignore")
        return get_peft_model(
            model, LoraConfig(target_modules=targets, **{"r": 4, "lora_alpha": 6, **options})
        ).double()


@dataclass(frozen=True)
class Case:
    """A way to adapt a model: ``make`` returns it, ``at`` is what its anchors count from."""

    make: Callable[[], Any]
    at: str = "base"


def _two_adapters() -> Any:
    model = adapt(llama())
    model.add_adapter("second", LoraConfig(target_modules=["q_proj", "down_proj"], r=3, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


def _mica() -> Any:
    model = adapt(llama(), init_lora_weights="mica")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # Its own start is orthogonal to U.
                parameter.normal_()
    return model


CASES = {
    "LoRA": Case(lambda: adapt(llama())),
    "rsLoRA, rank and alpha patterns": Case(
        lambda: adapt(llama(), use_rslora=True, rank_pattern={"q_proj": 7}, alpha_pattern={"down_proj": 3})
    ),
    "PiSSA": Case(lambda: adapt(llama(), init_lora_weights="pissa"), "now"),
    "OLoRA": Case(lambda: adapt(llama(), init_lora_weights="olora"), "now"),
    "not 0 at the start": Case(lambda: adapt(llama(), init_lora_weights=False), "now"),
    "two adapters": Case(_two_adapters, "now"),
    "Conv1D": Case(lambda: adapt(gpt2(), ["c_attn", "c_fc", "wte"], fan_in_fan_out=True)),
    "embedding and head": Case(lambda: adapt(llama(), ["embed_tokens", "q_proj", "lm_head"])),
    "started embedding": Case(lambda: adapt(llama(), ["embed_tokens", "q_proj"], init_lora_weights=False), "now"),
    "DoRA": Case(lambda: adapt(llama(), use_dora=True)),
    "DoRA, transposed": Case(lambda: adapt(gpt2(), ["c_attn", "wte"], use_dora=True, fan_in_fan_out=True)),
    "started DoRA": Case(lambda: adapt(llama(), use_dora=True, init_lora_weights=False), "now"),
    "MiCA": Case(_mica),
}


def anchors_of(model: Any, at: str = "base", **options: Any) -> rk.Anchors:
    return rk.Anchors.from_model(model, RANK, progress=False, **{"basis_dtype": torch.float64, "at": at, **options})


def layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the layers with adapters, by their weights' names in the plain model."""
    for path, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_base_layer"):
            yield path.removeprefix("base_model.model.") + ".weight", module


def effective(module: Any) -> Tensor:
    """Compute the weight (m, n) that a layer computes with, by PEFT's own deltas; differentiable in its adapters."""
    base = module.get_base_layer().weight.detach()
    weight = base
    for adapter in module.active_adapters:
        if adapter not in module.scaling:
            continue
        delta = module.get_delta_weight(adapter)
        if adapter not in module.lora_magnitude_vector:
            weight = weight + delta
            continue
        # An embedding and a Conv1D have their outputs in columns.
        outputs = 1 if adapter in module.lora_embedding_A or module.fan_in_fan_out else 0
        norms = (base + delta).detach().norm(dim=1 - outputs, keepdim=True)
        magnitude = module.lora_magnitude_vector[adapter].weight
        weight = (magnitude.unsqueeze(1 - outputs) / norms) * (base + delta)
    return weight


def pretrained(model: Any) -> dict[str, Tensor]:
    """Return the weights that the layers compute with now."""
    return {name: effective(module).detach().clone() for name, module in layers(model)}


def dense_penalty(model: Any, anchors: rk.Anchors, start: dict[str, Tensor]) -> Tensor:
    """Compute R by its definition, from m x n tensors."""
    total = torch.zeros((), dtype=torch.float64)
    for name, module in layers(model):
        anchor = anchors[name]
        drift = effective(module).double() - start[name].double()
        if anchor.left is not None and anchor.right is not None:
            drift = anchor.left.double().T @ drift @ anchor.right.double()
        total = total + drift.square().sum()
    return total


@torch.no_grad()
def move(model: nn.Module, scale: float = 0.05) -> None:
    """Move everything that trains."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the worst error of a gradient, relative to its norm."""
    assert set(found) == set(wanted)
    return max(float((found[name].double() - g.double()).norm() / g.double().norm()) for name, g in wanted.items())
