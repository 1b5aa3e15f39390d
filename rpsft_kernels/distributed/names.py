"""Names of parameters that do not depend on how a model is wrapped."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ..private_names import WRAPPED, components_of_adapters

# Of the components that PEFT inserts those behind which there is the module that its parameters are to be judged by.
_HOLD_THE_WEIGHT = ("base_model", "model", "token_adapter")


def canonical_name(name: str, replicas: Collection[str] = (), inserted: Collection[str] = ()) -> str:
    """Return ``name`` without the components that wrappers put into it.

    Args:
        name: A dotted path such as ``"module._orig_mod.layers.0.weight"``.
        replicas: Paths of the modules that are DistributedDataParallel, DataParallel or DeepSpeedEngine (``""``
            for the model itself). A component ``module`` directly below such a path belongs to the wrapper.
        inserted: Paths of modules whose last component a wrapper has put there (those of PEFT).
    """
    components = name.split(".")
    kept = []
    for i, component in enumerate(components):
        if component in WRAPPED or (component == "module" and ".".join(components[:i]) in replicas):
            continue
        if inserted and ".".join(components[: i + 1]) in inserted:
            continue
        kept.append(component)
    return ".".join(kept)


def is_deepspeed(module: nn.Module) -> bool:
    """Whether ``module`` is a DeepSpeedEngine; DeepSpeed is not imported to find out."""
    return type(module).__module__.startswith("deepspeed.") and hasattr(module, "zero_optimization_stage")


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Find every parameter of ``model`` by canonical name; a tied parameter under each of its names.

    Raises:
        ValueError: ``model`` is not a module, or two different parameters have one canonical name.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    replicas, inserted = _replica_paths(model), set(components_of_adapters(model))
    weights: dict[str, nn.Parameter] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        name = canonical_name(path, replicas, inserted)
        if weights.setdefault(name, parameter) is not parameter:
            raise ValueError(
                f"model: got two different parameters named {name!r} once wrappers are left out (one is "
                f"{path!r}), expected one; rename a submodule"
            )
    return weights


def named_owners(model: nn.Module) -> dict[str, nn.Module]:
    """Find every module by canonical path, ``""`` for the model; of a module and its wrappers the innermost.

    Of a layer with an adapter and of a trained copy it is PEFT's module, which tells what the parameters below it are.
    """
    replicas, inserted = _replica_paths(model), set(components_of_adapters(model))
    owners: dict[str, nn.Module] = {}
    # Wrappers come before what they wrap.
    for path, module in model.named_modules(remove_duplicate=False):
        name = canonical_name(path, replicas, inserted)
        if name not in owners or path not in inserted or path.rpartition(".")[2] in _HOLD_THE_WEIGHT:
            owners[name] = module
    return owners


def _replica_paths(model: nn.Module) -> set[str]:
    return {
        path
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, (DistributedDataParallel, DataParallel)) or is_deepspeed(module)
    }
