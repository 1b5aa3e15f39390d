"""The private names of torch, DeepSpeed and others that this package reads, and how each version spells them.

Neither library promises these names, so that no other file may hold any. Where no spelling fits, reading raises a
RuntimeError that names the installed version. No missing name is passed over: a shard that is not found would give a
wrong penalty. The attributes of PEFT and bitsandbytes have files here, too, which import neither.
"""

from .accelerate_names import prepared_models, prepared_optimizers
from .deepspeed_names import MasterRange, Zero3Parameter, averaging_group, find_master_range, is_linked_by_deepspeed
from .peft_names import components_of_adapters, is_adapted
from .torch_names import (
    WRAPPED,
    Fsdp1Handle,
    Fsdp1Weight,
    constant_under_dynamo,
    count_averaged_by_ddp,
    default_store,
    flat_mesh,
    fsdp2_parameters,
    hooks_after_gradient,
    hooks_before_gradient,
    in_forward_mode,
    in_transform,
    is_batch,
    is_differentiated,
    is_fsdp1_flat,
    is_traced,
    modules_of,
    optimizers_in_backward,
    parameters_of,
    replicated_by_ddp,
    shards_before,
    skips_unused,
    without_compiler,
)

__all__ = [
    "WRAPPED",
    "Fsdp1Handle",
    "Fsdp1Weight",
    "MasterRange",
    "Zero3Parameter",
    "averaging_group",
    "components_of_adapters",
    "constant_under_dynamo",
    "count_averaged_by_ddp",
    "default_store",
    "find_master_range",
    "flat_mesh",
    "fsdp2_parameters",
    "hooks_after_gradient",
    "hooks_before_gradient",
    "in_forward_mode",
    "in_transform",
    "is_adapted",
    "is_batch",
    "is_differentiated",
    "is_fsdp1_flat",
    "is_linked_by_deepspeed",
    "is_traced",
    "modules_of",
    "optimizers_in_backward",
    "parameters_of",
    "prepared_models",
    "prepared_optimizers",
    "replicated_by_ddp",
    "shards_before",
    "skips_unused",
    "without_compiler",
]
