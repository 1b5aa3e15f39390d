"""The columns of ``fields`` as the constants that kernels read: Triton takes no other globals."""

from __future__ import annotations

import triton.language as tl

from ..fields import INDEX, WIDTH

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
