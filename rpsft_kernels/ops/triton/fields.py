"""The columns of the int64 table through which a grouped kernel finds one weight: pointers, extents, strides.

The kernels see every problem with its shorter side first: ``rows = min(m, n)``, ``cols = max(m, n)``, and
``left`` (rows, k) is the basis of the shorter side. A weight that is taller than wide enters transposed, by
its strides.
"""

from __future__ import annotations

_NAMES = (
    "WEIGHT",  # pointer to W, seen as (rows, cols)
    "BASE",  # pointer to W0, seen in the same way
    "LEFT",  # pointer to the basis of the rows, (rows, k)
    "RIGHT",  # pointer to the basis of the columns, (cols, k)
    "PLANES",  # pointer to T, later P: parts of (rows, k), padded to whole tiles
    "DRIFT",  # pointer to C (k, k)
    "BLOCK",  # pointer to B (k, k)
    "PARTIAL",  # pointer to the split sums of C: (splits, k, k), padded to whole tiles
    "GRAD",  # pointer to G
    "ROUNDED",  # pointer to C in bfloat16, where a kernel wants it so
    "ROWS",
    "COLS",
    "RANK",
    "WEIGHT_ROW",
    "WEIGHT_COL",
    "BASE_ROW",
    "BASE_COL",
    "LEFT_ROW",
    "LEFT_COL",
    "RIGHT_ROW",
    "RIGHT_COL",
    "GRAD_ROW",
    "GRAD_COL",
    "ROUNDED_ROW",
    "PLANES_ROW",  # row stride of one part
    "PLANES_ROWS",  # rows of one part; parts lie one below the other
    "STRETCHES",  # number of stretches of columns that the sum T = W V is cut into; each has planes of its own
    "SPLITS",  # number of stretches of rows, of all planes together, that the sum C = U^T T is cut into
    "SQUARES",  # first slot of this weight's sums of squares, one slot per tile
    "SLOTS",  # number of these slots
    "NUMBER",  # index of the weight's scale, or of its sum of squares
)
INDEX = {name: i for i, name in enumerate(_NAMES)}
# Kernels are compiled for tables at multiples of 16 bytes, and the rows of a launch may begin at any row of a table.
WIDTH = len(_NAMES) + len(_NAMES) % 2
