"""Finds the shard of a weight that lies here, and lets processes agree and sum. Knows no kernel and no anchor."""

from .discover import ParameterRef, find_parameters, locate_tensor
from .group_call import FAILED, GroupCall, PendingSum
from .names import named_owners
from .partition import assign_shards, divide
from .shard import Rect, Shard
from .snapshot import ModuleSnapshot
from .transfer import Transfer
from .weight import LocalWeight, ReplicatedWeight
from .wire import gather_objects, remember_device, remembered_device

__all__ = [
    "FAILED",
    "GroupCall",
    "LocalWeight",
    "ModuleSnapshot",
    "ParameterRef",
    "PendingSum",
    "Rect",
    "ReplicatedWeight",
    "Shard",
    "Transfer",
    "assign_shards",
    "divide",
    "find_parameters",
    "gather_objects",
    "locate_tensor",
    "named_owners",
    "remember_device",
    "remembered_device",
]
