"""Reads torch's private names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from .table import TABLE, read, spellings

_dispatch = importlib.import_module("torch.utils._python_dispatch")
_functorch = importlib.import_module("torch._C._functorch")
_Function = TypeVar("_Function", bound=Callable[..., Any])
# Components that wrappers put into the paths of parameters.
WRAPPED = frozenset(row.name for row in TABLE if row.meaning == "wrapped module")


def constant_under_dynamo(function: _Function) -> _Function:
    """Do as torch.compiler.assume_constant_result does, without importing Dynamo and with it triton."""
    (row,) = spellings["function", "constant under Dynamo"]
    setattr(function, row.name, True)
    return function


def _reader(holder: str, meaning: str) -> Callable[[Any], Any]:
    """Make a fast reader of an attribute that has one spelling, for attributes read hundreds of times a step."""
    (row,) = spellings[holder, meaning]
    return attrgetter(row.name)


modules_of: Callable[[nn.Module], dict[str, nn.Module | None]] = _reader("Module", "modules by name")
parameters_of: Callable[[nn.Module], dict[str, nn.Parameter | None]] = _reader("Module", "parameters by name")
_hooks: Callable[[Tensor], Any] = _reader("Tensor", "hooks after its gradient is complete")
_hooks_before: Callable[[Tensor], Any] = _reader("Tensor", "hooks that get its gradient")
_IN_BACKWARD = spellings["optimizer in backward", "optimizers of a parameter"][0].name
_UNSCALES = spellings["Optimizer", "whether its step unscales gradients"][0].name
_SKIPPING: dict[str, Callable[[nn.Module], bool]] = {
    spellings["DistributedDataParallel", meaning][0].name: _reader("DistributedDataParallel", meaning)
    for meaning in ("whether it looks for unused parameters", "whether its graph is static")
}
_level_of_forward_mode: Callable[[Any], int] = _reader("torch.autograd.forward_ad", "current level")


def without_compiler(module: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` has wrapped, or the module itself."""
    (row,) = spellings["torch.compile's OptimizedModule", "wrapped module"]
    wrapped: nn.Module = getattr(module, row.name, module)
    return wrapped


def in_forward_mode() -> bool:
    """Whether forward-mode differentiation is on, so that tensors may have tangents."""
    return _level_of_forward_mode(forward_ad) >= 0


def _function_of_functorch(meaning: str) -> Callable[..., Any]:
    function: Callable[..., Any] = read(_functorch, "torch._C._functorch", meaning)
    return function


_innermost_transform = _function_of_functorch("innermost transform, or None")
_is_differentiated = _function_of_functorch("whether a transform differentiates a tensor")
_is_batch = _function_of_functorch("whether a tensor is a batch")
_is_batch_of_gradients = _function_of_functorch("whether a tensor is a batch of gradients")


def in_transform() -> bool:
    """Whether a transform of torch.func runs, so that tensors may be its own."""
    return _innermost_transform() is not None


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a transform of torch.func differentiates the tensor."""
    return bool(_is_differentiated(tensor))


def is_batch(tensor: Tensor) -> bool:
    """Whether the tensor is a batch of torch.func.vmap, or of a backward pass with ``is_grads_batched=True``."""
    return bool(_is_batch(tensor) or _is_batch_of_gradients(tensor))


def is_traced() -> bool:
    """Whether operators are recorded (make_fx), or their tensors are fake or functional ones.

    A recording would miss kernels that no operator starts, and fake tensors have no memory for them to read.
    """
    modes = read(_dispatch, "torch.utils._python_dispatch", "modes that are on")()
    if not modes:
        return False
    (row,) = spellings["TorchDispatchMode", "kind, of torch's own"]
    return any(getattr(mode, row.name, None) is not None for mode in modes)


def default_store() -> Any:
    """Return the store of the job's default process group; None where there is no group."""
    get = read(torch.distributed.distributed_c10d, "torch.distributed.distributed_c10d", "store of the job")
    try:
        return get()
    except (RuntimeError, ValueError):
        return None


def hooks_after_gradient(parameter: Tensor) -> list[Any]:
    """Return the hooks that run within the backward pass once the parameter's gradient is complete."""
    return list((_hooks(parameter) or {}).values())


def hooks_before_gradient(parameter: Tensor) -> list[Any]:
    """Return the hooks that get the parameter's gradient within the backward pass (``register_hook``)."""
    return list((_hooks_before(parameter) or {}).values())


def optimizers_in_backward(parameter: Tensor) -> list[Any]:
    """Return the optimizers that torch lets step the parameter within the backward pass."""
    return list(getattr(parameter, _IN_BACKWARD, ()))


def unscales_within_step(optimizer: object) -> bool:
    """Whether an optimizer divides gradients by GradScaler's scale itself, in its step, as fused ones do."""
    # Those that do not, may lack the attribute.
    return bool(getattr(optimizer, _UNSCALES, False))


def replicated_by_ddp(module: nn.Module) -> list[Tensor]:
    """Return the parameters that a DistributedDataParallel keeps equal: those that it was made with, frozen or not."""
    return list(read(module, "DistributedDataParallel", "parameters when it was made"))


def count_averaged_by_ddp(module: nn.Module) -> int:
    """Count the parameters that a DistributedDataParallel averages: those that required grad when it was made."""
    facts = read(module, "DistributedDataParallel", "facts about itself")()
    return int(facts["num_parameter_tensors"])


def skips_unused(module: nn.Module) -> str:
    """Name the option by which a DistributedDataParallel leaves gradients alone that no backward pass gave; "" if it
    averages all.
    """
    return next((option for option, is_on in _SKIPPING.items() if is_on(module)), "")


def flat_mesh(mesh: Any) -> Any:
    """Return the ranks of a DeviceMesh in one dimension."""
    return read(mesh, "DeviceMesh", "mesh of one dimension with the same ranks")()


def shards_before(placement: Any) -> int:
    """Count the shards of a tensor's dimension before this placement cuts them: 1 where it is the first to cut."""
    if type(placement).__name__ == "Shard":
        return 1
    return int(read(placement, "_StridedShard", "number of shards that cut before it"))


def fsdp2_parameters(module: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    """Yield (parameter that the model shows now, the sharded one) for all that FSDP2 manages in this module itself."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        return
    state = read(module, "FSDPModule", "state")()
    groups = read(state, "FSDPState", "groups of parameters")
    # Versions differ: a list, or one group or None.
    for group in groups if isinstance(groups, (list, tuple)) else [groups]:
        for parameter in [] if group is None else read(group, "FSDPParamGroup", "parameters"):
            place = read(parameter, "FSDPParam", "place in the model")
            owner, name = (read(place, "ParamModuleInfo", meaning) for meaning in ("module", "name in the module"))
            yield getattr(owner, name), read(parameter, "FSDPParam", "sharded parameter")


@dataclass(frozen=True)
class Fsdp1Weight:
    """One weight of an FSDP1 FlatParameter.

    Its elements ``begin`` to ``end`` lie in this rank's shard, from ``offset`` on. ``original`` is the module's own
    parameter where FSDP1 keeps it.
    """

    name: str
    shape: tuple[int, ...]
    original: nn.Parameter | None
    begin: int
    end: int
    offset: int


@dataclass(frozen=True, eq=False)
class Fsdp1Handle:
    """The facts that FSDP1 records of one FlatParameter."""

    handle: Any

    @staticmethod
    def of(module: nn.Module) -> Fsdp1Handle | None:
        """Return None for a module that is not FSDP1's, or that flattens nothing."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp is None or not isinstance(module, fsdp.FullyShardedDataParallel):
            return None
        handle = read(module, "FullyShardedDataParallel", "handle, or None where it flattens nothing")
        return Fsdp1Handle(handle) if handle else None

    def _read(self, meaning: str) -> Any:
        return read(self.handle, "FlatParamHandle", meaning)

    def _read_flat(self, meaning: str) -> Any:
        return read(self.parameter, "FlatParameter", meaning)

    @property
    def parameter(self) -> nn.Parameter:
        parameter: nn.Parameter = self._read("flat parameter")
        return parameter

    @property
    def group(self) -> Any:
        """The ranks that hold the shards; None where this rank holds everything."""
        group = self._read("ranks that hold the shards")
        return group if self._read("whether ranks hold shards") and group.size() > 1 else None

    @property
    def gathered(self) -> bool:
        return bool(self.parameter.shape != self._read_flat("size of the shard"))

    @property
    def between_passes(self) -> bool:
        """Whether a forward pass has no backward pass yet: FSDP1 would not see a gradient that is made now."""
        return bool(self._read("whether parameters are between forward and backward pass"))

    @property
    def reduced_dtype(self) -> torch.dtype | None:
        """Dtype of gradients where it is not the parameters' own; None where it is."""
        dtype: torch.dtype | None = self._read("dtype of the forward and the backward pass")
        return dtype if self._read("whether gradients keep that dtype") else None

    @property
    def names(self) -> list[str]:
        return list(self._read_flat("names of its weights"))

    @property
    def weights(self) -> list[Fsdp1Weight]:
        names, shapes = self.names, self._read_flat("shapes of its weights")
        own = self._read_flat("modules' own parameters")
        originals = own if self._read("whether modules keep their own parameters") else [None] * len(names)
        weights = []
        places = self._read_flat("where its weights lie in the shard")
        for name, shape, original, place in zip(names, shapes, originals, places, strict=True):
            begin, end, offset = 0, 0, 0
            if read(place, "_ShardParamInfo", "whether the shard has any of the weight"):
                begin = read(place, "_ShardParamInfo", "first element of the weight")
                end = read(place, "_ShardParamInfo", "last element of the weight") + 1
                offset = read(place, "_ShardParamInfo", "where the weight begins in the shard")
            weights.append(Fsdp1Weight(name, tuple(shape), original, begin=begin, end=end, offset=offset))
        return weights

    @property
    def tied(self) -> Iterator[tuple[str, str]]:
        """Pairs of a name and the name of the weight in :attr:`weights` that it is tied to."""
        for info in self._read_flat("weights tied to its weights"):
            names = [
                read(info, "SharedParamInfo", meaning)
                for meaning in (
                    "module's name",
                    "name",
                    "name of that weight's module",
                    "name of the weight that it is tied to",
                )
            ]
            yield ".".join(filter(None, names[:2])), ".".join(filter(None, names[2:]))


def is_fsdp1_flat(parameter: Tensor) -> bool:
    """Whether ``parameter`` is a FlatParameter of FSDP1."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(parameter, fsdp.FlatParameter)
