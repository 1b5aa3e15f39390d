"""The columns of the int64 table through which a grouped kernel finds one weight: pointers, extents, strides.

The kernels see every problem with its shorter side first: ``rows = min(m, n)``, ``cols = max(m, n)``, and
``left`` (rows, k) is the basis of the shorter side. A weight that is taller than wide enters transposed, by
its strides.
"""

from __future__ import annotations

import triton.language as tl

_NAMES = (
    "WEIGHT",  # pointer to W, seen as (rows, cols)
    "BASE",  # pointer to W0, seen alike
    "LEFT",  # pointer to the basis of the rows, (rows, k)
    "RIGHT",  # pointer to the basis of the columns, (cols, k)
    "PLANES",  # pointer to T, later P: parts of (rows, k), padded to whole tiles
    "DRIFT",  # pointer to C (k, k)
    "BLOCK",  # pointer to B (k, k)
    "PARTIAL",  # pointer to the split sums of C: (splits, k, k), padded to whole tiles
    "GRAD",  # pointer to G
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
    "PLANES_ROW",  # row stride of one part
    "PLANES_ROWS",  # rows of one part; parts lie one below the other
    "SPLITS",  # into how many stretches of rows the sum C = U^T T is cut
    "SQUARES",  # first slot of this weight's sums of squares, one slot per tile
    "SLOTS",  # how many slots it has
    "NUMBER",  # the weight's place in the operation's lists: where its scale and its total stand
)
INDEX = {name: i for i, name in enumerate(_NAMES)}
WIDTH = len(_NAMES)

FIELDS = tl.constexpr(WIDTH)
WEIGHT = tl.constexpr(INDEX["WEIGHT"])
BASE = tl.constexpr(INDEX["BASE"])
LEFT = tl.constexpr(INDEX["LEFT"])
RIGHT = tl.constexpr(INDEX["RIGHT"])
PLANES = tl.constexpr(INDEX["PLANES"])
DRIFT = tl.constexpr(INDEX["DRIFT"])
BLOCK = tl.constexpr(INDEX["BLOCK"])
PARTIAL = tl.constexpr(INDEX["PARTIAL"])
GRAD = tl.constexpr(INDEX["GRAD"])
ROWS = tl.constexpr(INDEX["ROWS"])
COLS = tl.constexpr(INDEX["COLS"])
RANK = tl.constexpr(INDEX["RANK"])
WEIGHT_ROW = tl.constexpr(INDEX["WEIGHT_ROW"])
WEIGHT_COL = tl.constexpr(INDEX["WEIGHT_COL"])
BASE_ROW = tl.constexpr(INDEX["BASE_ROW"])
BASE_COL = tl.constexpr(INDEX["BASE_COL"])
LEFT_ROW = tl.constexpr(INDEX["LEFT_ROW"])
LEFT_COL = tl.constexpr(INDEX["LEFT_COL"])
RIGHT_ROW = tl.constexpr(INDEX["RIGHT_ROW"])
RIGHT_COL = tl.constexpr(INDEX["RIGHT_COL"])
GRAD_ROW = tl.constexpr(INDEX["GRAD_ROW"])
GRAD_COL = tl.constexpr(INDEX["GRAD_COL"])
PLANES_ROW = tl.constexpr(INDEX["PLANES_ROW"])
PLANES_ROWS = tl.constexpr(INDEX["PLANES_ROWS"])
SPLITS = tl.constexpr(INDEX["SPLITS"])
SQUARES = tl.constexpr(INDEX["SQUARES"])
SLOTS = tl.constexpr(INDEX["SLOTS"])
NUMBER = tl.constexpr(INDEX["NUMBER"])
