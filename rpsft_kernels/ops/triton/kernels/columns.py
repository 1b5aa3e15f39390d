"""The columns of ``fields`` as the constants that kernels read: Triton takes no other globals."""

from __future__ import annotations

import hashlib

import triton.language as tl

from ..fields import INDEX, WIDTH

# A number that changes with the columns. Triton's cache of compiled kernels does not see what a kernel reads as an
# attribute (``f.WEIGHT``), only names of its own. Every kernel reads this name, so that no machine code that was
# compiled for other columns is taken for it.
LAYOUT = tl.constexpr(int.from_bytes(hashlib.sha256(repr(INDEX).encode()).digest()[:4], "big"))
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
ROUNDED = tl.constexpr(INDEX["ROUNDED"])
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
ROUNDED_ROW = tl.constexpr(INDEX["ROUNDED_ROW"])
PLANES_ROW = tl.constexpr(INDEX["PLANES_ROW"])
PLANES_ROWS = tl.constexpr(INDEX["PLANES_ROWS"])
STRETCHES = tl.constexpr(INDEX["STRETCHES"])
SPLITS = tl.constexpr(INDEX["SPLITS"])
SQUARES = tl.constexpr(INDEX["SQUARES"])
SLOTS = tl.constexpr(INDEX["SLOTS"])
NUMBER = tl.constexpr(INDEX["NUMBER"])
