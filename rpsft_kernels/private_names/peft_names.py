"""Reads what PEFT keeps of a layer's adapters, by the names of its attributes: PEFT is not imported for it.

Checked with PEFT 0.21.2. These names are public ones, so that no other spellings are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

# Variants of LoRA whose weight is W + s B A as that of LoRA itself, and those whose rows are scaled besides.
_PLAIN_VARIANTS = ("MiCALinearVariant", "MiCAEmbeddingVariant")
_SCALED_VARIANTS = ("DoraLinearVariant", "DoraEmbeddingVariant")
# Starts of PEFT that take s B A out of the base, so that it is not the pretrained weight any more.
_STARTS_IN_THE_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


def _children(module: nn.Module) -> dict[str, nn.Module]:
    # ``hasattr`` would find those of a module below, which PEFT's wrappers show as their own.
    return dict(module.named_children())


def is_adapter_layer(module: nn.Module) -> bool:
    """Whether the module puts adapters beside a base layer that it holds."""
    return "base_layer" in _children(module) and hasattr(module, "get_base_layer")


def _layer_below(module: nn.Module) -> nn.Module:
    return _children(module)["base_layer"]


def name_of_weight(module: nn.Module) -> str:
    """Return the canonical name, within an adapter layer, of the parameter that its adapters move.

    There need not be a parameter of that name: of layers that hold packed values there is none.
    """
    path, below = "", _layer_below(module)
    while is_adapter_layer(below):
        path, below = f"{path}base_layer.", _layer_below(below)
    parameter = vars(module).get("parameter_name")
    if isinstance(parameter, str):
        return path + parameter
    return path + ("in_proj_weight" if _is_attention(below) else "weight")


def _is_attention(layer: nn.Module) -> bool:
    return any(name == "in_proj_weight" for name, _ in layer.named_parameters(recurse=False))


def is_trained_copy(module: nn.Module) -> bool:
    """Whether the module trains a copy of another one (``modules_to_save``)."""
    children = _children(module)
    return "original_module" in children and "modules_to_save" in children and hasattr(module, "active_adapters")


def is_adapted(model: nn.Module) -> bool:
    """Whether PEFT has put adapters or trained copies into the model."""
    return any(is_adapter_layer(module) or is_trained_copy(module) for module in model.modules())


def active_copy(module: nn.Module) -> str | None:
    """Return the name of the trained copy that a module computes with; None where that is the original."""
    copies: Any = _children(module)["modules_to_save"]
    names = () if module.disable_adapters else module.active_adapters
    return next((name for name in names if name in copies), None)  # type: ignore[union-attr]


def components_of_adapters(model: nn.Module) -> Iterator[str]:
    """Yield the paths of modules that PEFT has put between a parameter's name and the plain model's name of it."""
    for path, module in model.named_modules(remove_duplicate=False):
        children, prefix = _children(module), f"{path}." if path else ""
        if "base_model" in children and (
            hasattr(module, "get_base_model") or type(module).__name__ == "PeftMixedModel"
        ):
            yield f"{prefix}base_model"
        if "model" in children and hasattr(module, "inject_adapter"):
            yield f"{prefix}model"
        # Of several around one layer (adapters of several parameters of it) the outer ones keep their names, so that
        # their parts have different ones.
        if is_adapter_layer(module) and not is_adapter_layer(_layer_below(module)):
            yield f"{prefix}base_layer"
        if "token_adapter" in children and hasattr(module, "active_adapters"):
            yield f"{prefix}token_adapter"
        if is_trained_copy(module):
            name = active_copy(module)
            if name is not None:
                yield f"{prefix}modules_to_save"
                yield f"{prefix}modules_to_save.{name}"


def active_adapters(module: Any) -> tuple[str, ...]:
    """Return the names of the adapters of a LoRA layer that are on, in their order."""
    return tuple(name for name in module.active_adapters if name in module.scaling)


def scaling_of(module: Any, adapter: str) -> float:
    return float(module.scaling[adapter])


def is_merged(module: Any) -> bool:
    return bool(module.merged)


def is_disabled(module: Any) -> bool:
    return bool(module.disable_adapters)


def is_transposed(module: Any, adapter: str) -> bool:
    """Whether the base holds the transpose of B A: a Conv1D (``fan_in_fan_out``), or an embedding."""
    return adapter in module.lora_embedding_A or bool(getattr(module, "fan_in_fan_out", False))


def names_of_factors(module: Any, adapter: str) -> tuple[str, str]:
    """Return the names, within an adapter layer, of B (out, r) and A (r, in) of an adapter."""
    if adapter in module.lora_embedding_A:
        return f"lora_embedding_B.{adapter}", f"lora_embedding_A.{adapter}"
    return f"lora_B.{adapter}.weight", f"lora_A.{adapter}.weight"


def name_of_magnitude(module: Any, adapter: str) -> str | None:
    """Return the name, within an adapter layer, of DoRA's magnitudes (out,); None for other adapters."""
    return f"lora_magnitude_vector.{adapter}.weight" if adapter in module.lora_magnitude_vector else None


def base_of(module: Any) -> nn.Module:
    """Return the layer that an adapter layer holds."""
    base: nn.Module = module.get_base_layer()
    return base


def describe_tuner(module: nn.Module) -> str:
    """Return the name of an adapter layer's class with its package, such as ``"loha.Linear"``."""
    # A layer of the user's own may be of a module in no package.
    return ".".join([*type(module).__module__.split(".")[-2:-1], type(module).__name__])


def reason_no_lora(module: nn.Module) -> str | None:
    """Return why an adapter layer's weight is not known to be W + s B A; None where it is."""
    parts = ("lora_A", "lora_B", "lora_embedding_A", "lora_magnitude_vector", "scaling", "active_adapters", "merged")
    if not all(hasattr(module, part) for part in parts):
        return "its adapters are none of LoRA's"
    if hasattr(module, "lora_E"):
        return "AdaLoRA's singular values are not served"
    if hasattr(module, "parameter_name"):
        return "its adapters are of a parameter of the layer (target_parameters), not of its weight"
    if hasattr(module, "is_parallel_a"):
        return "its factors are cut by Megatron"
    if is_adapter_layer(_layer_below(module)):
        return "it wraps another adapter layer"
    if _is_attention(_layer_below(module)):
        return "they move three projections in one weight (in_proj_weight)"
    forward = vars(module).get("forward")
    if type(getattr(forward, "__self__", None)).__name__.startswith("XLora"):
        return "X-LoRA weighs its adapters anew for every token, so that there is no one weight W + s B A"
    variants = getattr(module, "lora_variant", {})
    for adapter in active_adapters(module):
        variant = type(variants[adapter]).__name__ if adapter in variants else None
        if variant not in (None, *_PLAIN_VARIANTS, *_SCALED_VARIANTS):
            return f"{variant} is a variant of LoRA whose weight is not W + s B A"
        if adapter not in module.lora_embedding_A and not hasattr(module.lora_A[adapter], "weight"):  # type: ignore[union-attr, operator, index]
            return "its factors are no linear layers"
    return None


def knows_start(model: nn.Module, adapter: str) -> bool:
    """Whether the model, or a part of it, has the configuration of an adapter, which tells how it was initialised."""
    return _configuration(model, adapter) is not None


def start_in_the_base(model: nn.Module, adapter: str) -> str | None:
    """Return PEFT's name of the start that has taken s B A out of the base of an adapter; None for other starts."""
    start = getattr(_configuration(model, adapter), "init_lora_weights", None)
    changes_base = isinstance(start, str) and start.lower().startswith(_STARTS_IN_THE_BASE)
    return str(start) if changes_base else None


def _configuration(model: nn.Module, adapter: str) -> object | None:
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        if isinstance(configs, dict) and adapter in configs:
            found: object = configs[adapter]
            return found
    return None
