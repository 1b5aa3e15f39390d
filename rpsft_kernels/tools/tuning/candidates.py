"""The rows of a tile table that ``tune`` tries for each phase."""

from __future__ import annotations

from typing import Any

from ...ops.triton.aot.targets import BY_TABLE

# A row of a tile table, with its rank or without.
Row = dict[str, Any]

_PLAIN_BLOCKS = ((64, 128, 64), (128, 128, 32), (128, 128, 64), (128, 256, 64), (256, 128, 64))
_PLAIN_STAGES = (2, 3, 4)
# Rows and columns of warp-specialised tiles whose sums fit a consumer's registers. Project and pull give each of two
# consumers half of a tile's rows, a gradient's tile belongs to one.
_SPECIALISED_TILES = {
    "project": ((128, 256), (128, 128), (128, 64), (128, 32)),
    "pull": ((128, 256), (128, 128), (128, 64), (128, 32)),
    "gradient": ((128, 128), (64, 256), (128, 64)),
}
_MOST_STAGES = 6
# Bytes of shared memory for barriers and for the arguments that the warps of a specialised program share.
_BARRIERS = 1 << 10


def list_candidates(phase: str, shipped: Row, rank: int, architecture: str) -> list[Row]:
    """The rows to try for a phase of a tile table beside the shipped one, the most promising first.

    Warp-specialised ones, where the shipped row is one, are those whose shared memory a block may have.
    """
    specialised = _list_specialised(phase, rank, architecture) if shipped.get("specialised") else []
    plain = [
        _row((m, n, k), warps=8, stages=stages, blocks_per_sm=blocks)
        for m, n, k in _PLAIN_BLOCKS
        for stages in _PLAIN_STAGES
        for blocks in (1, 2)
    ]
    return specialised + plain


def _list_specialised(phase: str, rank: int, architecture: str) -> list[Row]:
    rows = []
    # The columns of project's and pull's tiles lie along the rank: no wider than it takes, nor far narrower. So do the
    # steps of pull and gradient.
    widest = max(32, 1 << (rank - 1).bit_length())
    narrowest = min(64, widest)
    steps = [k for k in (64, 32) if phase == "project" or k <= widest]
    for m, n in _SPECIALISED_TILES.get(phase, ()):
        if phase != "gradient" and not narrowest <= n <= widest:
            continue
        for k in steps:
            deepest = _deepest_ring(phase, (m, n, k), architecture)
            # Shorter steps are tried with the deepest ring alone.
            fewest = max(2, deepest - 2) if k == steps[0] else deepest
            for stages in range(deepest, fewest - 1, -1):
                row = _row((m, n, k), warps=4, stages=stages, blocks_per_sm=1, specialised=True)
                rows.append(row)
                if phase == "project" and n == 256:
                    narrow = {"block_n": n // 2, "stages": _deepest_ring(phase, (m, n // 2, k), architecture)}
                    rows.append({**row, "narrow": narrow})
    return rows


def _row(blocks: tuple[int, int, int], **others: Any) -> Row:
    return {**dict(zip(("block_m", "block_n", "block_k"), blocks, strict=True)), **others}


def _deepest_ring(phase: str, blocks: tuple[int, int, int], architecture: str) -> int:
    """The most stages of a specialised kernel (operands in bfloat16) whose shared memory a block may have."""
    m, n, k = blocks
    # Project holds W and W0. A gradient's two consumers have a tile of G each.
    slot, fixed = {
        "project": (2 * k * (2 * m + n), 0),
        "pull": (2 * k * (m + n), 0),
        "gradient": (2 * k * (m + n), 2 * 2 * m * n),
    }[phase]
    return min(_MOST_STAGES, (BY_TABLE[architecture].block_shared - _BARRIERS - fixed) // slot)


def describe_row(row: Row) -> str:
    """A row in words, such as "128x256x64, 4 warps, 3 stages, specialised"."""
    words = f"{row['block_m']}x{row['block_n']}x{row['block_k']}, {row['warps']} warps, {row['stages']} stages"
    if row["blocks_per_sm"] != 1:
        words += f", {row['blocks_per_sm']} a multiprocessor"
    if "narrow" in row:
        words += f", narrow {row['narrow']['block_n']} with {row['narrow'].get('stages', row['stages'])} stages"
    return words + (", specialised" if row.get("specialised") else "")
