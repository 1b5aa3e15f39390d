"""How a weight lies over processes, and what they tell each other. Knows no kernel and no anchor."""

from .discover import Found, find_parameters, locate_tensor
from .group_call import Exchange, PendingSum
from .partition import divide, with_parts
from .shard import Part, Tile
from .transfer import Transfer
from .weight import LocalWeight, ReplicatedWeight

__all__ = [
    "Exchange",
    "Found",
    "LocalWeight",
    "Part",
    "PendingSum",
    "ReplicatedWeight",
    "Tile",
    "Transfer",
    "divide",
    "find_parameters",
    "locate_tensor",
    "with_parts",
]
