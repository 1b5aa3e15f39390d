"""How a weight lies over processes, and what they tell each other. Knows no kernel and no anchor."""

from .discover import ParameterRef, find_parameters, locate_tensor
from .group_call import GroupCall, PendingSum
from .partition import divide, with_parts
from .shard import Rect, Shard
from .transfer import Transfer
from .weight import LocalWeight, ReplicatedWeight

__all__ = [
    "GroupCall",
    "LocalWeight",
    "ParameterRef",
    "PendingSum",
    "Rect",
    "ReplicatedWeight",
    "Shard",
    "Transfer",
    "divide",
    "find_parameters",
    "locate_tensor",
    "with_parts",
]
