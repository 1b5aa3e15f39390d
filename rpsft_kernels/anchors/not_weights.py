"""Tells parameters that are no weights of their own: packed and quantised values, their scales, parts of adapters, and
parts of parametrised weights. A subspace of such numbers says nothing of the weight that the model multiplies by.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from ..distributed import ParameterRef, named_owners

PACKED = "packed quantised values"
SCALE = "scale or zero point of quantised values"
ADAPTER = "part of an adapter (PEFT)"
ADAPTED = "base of an adapter (PEFT): the effective weight, base and adapter together, is not a parameter"
KEPT_BESIDE_A_COPY = "original that PEFT keeps beside its trained copy"
PARAMETRISED = "part of a parametrised weight: the effective weight is not a parameter"

# Adapters whose modules do not list their parts as PEFT's do (``adapter_layer_names``): loralib's and torchtune's.
_ADAPTER_PARTS = {
    *("lora_A", "lora_B", "lora_a", "lora_b", "lora_embedding_A", "lora_embedding_B"),
    *("lora_magnitude_vector", "modules_to_save", "token_adapter"),
}
# What torch.nn.utils.weight_norm, spectral_norm and prune add to the name of a weight, which they make a plain tensor.
_STEMS_OF_HOOKS = ("_g", "_v", "_orig")
# bitsandbytes: attributes of a packed parameter, or of the layer that holds it where a wrapper has taken them away.
_MARKS_OF_PACKING = ("quant_state", "quant_type", "quant_storage", "bnb_quantized")
# How layers declare the (rows, columns) that their weight stands for.
_DECLARATIONS = (("out_features", "in_features"), ("num_embeddings", "embedding_dim"))
# Names that only quantised values have, in lower case: FP8's, GPTQ's, AWQ's, bitsandbytes' and compressed-tensors'.
_NAMES_OF_SCALES = {
    *("scb", "scale_inv", "absmax", "nested_absmax", "quant_map", "nested_quant_map", "zero_point", "zero_points"),
    "qzeros",
}
_ENDINGS_OF_SCALES = ("_scale_inv", "_zero_point", "_zero_points")
# Names that other parameters have, too: these are scales only beside quantised values.
_NAMES_BESIDE_QUANTISED = {"scale", "scales", "zero", "zeros", "zeropoint", "shift"}
_ENDINGS_BESIDE_QUANTISED = ("_scale", "_scales", "_zero", "_zeros")


def find_non_weights(model: nn.Module, parameters: Mapping[str, ParameterRef]) -> dict[str, str]:
    """Return why a parameter of two or more dimensions is no weight, for each one that is none, by canonical name."""
    owners = named_owners(model)
    parts = {id(module): _adapter_parts(module) for module in owners.values()}
    reasons = {}
    for name, reference in parameters.items():
        if len(reference.shape) < 2:
            continue
        chain = list(_modules_above(name, owners))
        reason = (
            _reason_parametrised(name, chain, parameters)
            or _reason_adapted(chain, parts)
            or _reason_quantised(name, reference, chain, parameters)
        )
        if reason is not None:
            reasons[name] = reason
    return reasons


# A module on the way to a parameter, and the component of the path below it.
_Step = tuple[nn.Module, str]


def _modules_above(name: str, owners: Mapping[str, nn.Module]) -> Iterator[_Step]:
    components = name.split(".")
    for i, component in enumerate(components):
        module = owners.get(".".join(components[:i]))
        if module is not None:
            yield module, component


def _reason_parametrised(name: str, chain: list[_Step], names: Collection[str]) -> str | None:
    if any(isinstance(module, ParametrizationList) for module, _ in chain):
        return PARAMETRISED
    for ending in _STEMS_OF_HOOKS:
        stem = name.removesuffix(ending)
        # FSDP1 makes parameters plain tensors, too, but these have a name.
        if stem != name and stem not in names and _is_plain_tensor(chain, stem):
            return PARAMETRISED
    return None


def _is_plain_tensor(chain: list[_Step], name: str) -> bool:
    owner = chain[-1][0] if chain else None
    return owner is not None and isinstance(vars(owner).get(name.rpartition(".")[2]), Tensor)


def _reason_adapted(chain: list[_Step], parts_by_module: Mapping[int, Collection[str]]) -> str | None:
    for module, component in chain:
        parts = parts_by_module[id(module)]
        if component in parts:
            return ADAPTER
        if parts and component == "original_module":
            return KEPT_BESIDE_A_COPY
        if parts and component in ("base_layer", "weight"):
            return ADAPTED
    return None


def _adapter_parts(module: nn.Module) -> set[str]:
    """Return the names of a module's parameters and modules that belong to an adapter."""
    listed = getattr(module, "adapter_layer_names", ())
    parts = set(listed) if isinstance(listed, (tuple, list)) else set()
    parts |= {part for part in _ADAPTER_PARTS if isinstance(getattr(module, part, None), (nn.Module, Tensor))}
    # Segment Anything has a prompt encoder that is none of PEFT's.
    return parts | ({"prompt_encoder"} if type(module).__module__.startswith("peft.") else set())


def _reason_quantised(
    name: str, reference: ParameterRef, chain: list[_Step], parameters: Mapping[str, ParameterRef]
) -> str | None:
    owner = chain[-1][0] if chain else None
    path, _, own_name = name.rpartition(".")
    if _is_packed(own_name, reference, owner):
        return PACKED
    own_name = own_name.lower()
    if own_name in _NAMES_OF_SCALES or own_name.endswith(_ENDINGS_OF_SCALES):
        return SCALE
    ambiguous = own_name in _NAMES_BESIDE_QUANTISED or own_name.endswith(_ENDINGS_BESIDE_QUANTISED)
    if ambiguous and owner is not None and _holds_quantised(path, owner, parameters):
        return SCALE
    return None


def _is_packed(own_name: str, reference: ParameterRef, owner: nn.Module | None) -> bool:
    parameter = reference.parameter
    if getattr(parameter, "quant_state", None) is not None or getattr(parameter, "bnb_quantized", False):
        return True
    # HQQ may view its bytes as floating point numbers.
    description = getattr(owner, "meta", None)
    if isinstance(description, dict) and "nbits" in description:
        return True
    if len(reference.shape) != 2 or 1 not in reference.shape:
        return False
    if any(hasattr(holder, mark) for holder in (parameter, owner) for mark in _MARKS_OF_PACKING):
        return True
    # A column that has neither of the sizes which its layer declares holds several values in each of its numbers. Other
    # parameters of a layer may have any shape.
    if own_name != "weight":
        return False
    for declaration in _DECLARATIONS:
        sizes = [getattr(owner, size, None) for size in declaration]
        if all(type(size) is int for size in sizes):
            return 1 not in sizes and max(reference.shape) not in sizes
    return False


def _holds_quantised(path: str, owner: nn.Module, parameters: Mapping[str, ParameterRef]) -> bool:
    """Whether the module of this path holds quantised values, as parameters or as buffers."""
    siblings = [reference for name, reference in parameters.items() if name.rpartition(".")[0] == path]
    facts = [(reference.dtype, reference.shape) for reference in siblings]
    facts += [(buffer.dtype, tuple(buffer.shape)) for buffer in owner.buffers(recurse=False)]
    return any(len(shape) >= 2 and _is_quantised(dtype) for dtype, shape in facts)


def _is_quantised(dtype: torch.dtype) -> bool:
    return dtype == torch.int32 or (dtype.itemsize == 1 and dtype != torch.bool)
