"""How a weight lies over processes, and what they tell each other. Knows no kernel and no anchor."""

from .division import divide, with_parts
from .exchange import Exchange, PendingSum
from .find import Found, find_parameters, locate_tensor
from .part import Part, Tile
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
