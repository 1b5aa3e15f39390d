"""What this package reads of torch's and DeepSpeed's private names, and how each version spells them.

Neither library promises these names, so that no other file may hold any. Where no spelling fits, reading raises a
RuntimeError that names the installed version. Nothing is passed over: what is not found of a sharded model would only
be a wrong penalty.
"""

from .of_deepspeed import Zero3Parameter, averaging_group
from .of_torch import (
    WRAPPED,
    Fsdp1Handle,
    Fsdp1Weight,
    constant_under_dynamo,
    default_store,
    flat_mesh,
    fsdp2_parameters,
    ignored_by_ddp,
    is_fsdp1_flat,
    is_traced,
    modules_of,
    parameters_of,
    shards_before,
)

__all__ = [
    "WRAPPED",
    "Fsdp1Handle",
    "Fsdp1Weight",
    "Zero3Parameter",
    "averaging_group",
    "constant_under_dynamo",
    "default_store",
    "flat_mesh",
    "fsdp2_parameters",
    "ignored_by_ddp",
    "is_fsdp1_flat",
    "is_traced",
    "modules_of",
    "parameters_of",
    "shards_before",
]
