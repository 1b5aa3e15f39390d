"""The shipped tables of tile shapes, one JSON file per table in ``tiles/``.

Neither torch nor triton is imported here: kernels are planned without triton and compiled without torch.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

_TABLES = Path(__file__).with_name("tiles")
PHASES = ("project", "drift", "pull", "gradient", "full")
_RANK_CLASSES = (32, 64, 128)


@dataclass(frozen=True)
class TileConfig:
    """One phase's tile shape, warps, pipeline stages, and the programs that share a multiprocessor.

    ``specialised``: the phase's warp-specialised kernel (``kernels/hopper.py``) serves it. ``warps`` are then those of
    one consumer.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    blocks_per_sm: int
    specialised: bool = False


_CONFIG_NAMES = tuple(field.name for field in fields(TileConfig) if field.name != "specialised")
# The table whose GPUs have warp-specialised kernels.
_SPECIALISED = "sm_90"
# The class that serves another one where a table has no rows for it.
_NEXT_CLASS = {"wide": "one part", "bare": "parts"}


@lru_cache(maxsize=16)
def tile_table(architecture: str) -> dict[str, Any]:
    """The table of this name: phase -> operand class -> rows of (largest rank, tile config).

    ``RPSFT_TILES`` names a JSON file of the same form (written by ``python -m rpsft_kernels tune``) whose phases
    replace the shipped ones of its architecture.
    """
    table: dict[str, Any] = json.loads((_TABLES / f"{architecture}.json").read_text())
    loaded = _load_tuned(os.environ.get("RPSFT_TILES", ""))
    if loaded.get("architecture") == architecture:
        table.update({phase: loaded[phase] for phase in PHASES if phase in loaded})
    return table


@lru_cache(maxsize=4)
def _load_tuned(path: str) -> dict[str, Any]:
    if not path:
        return {}
    try:
        loaded: dict[str, Any] = json.loads(Path(path).read_text())
        loaded.get("architecture")
    except (AttributeError, OSError, ValueError) as error:
        raise ValueError(
            f"environment variable RPSFT_TILES: cannot read {path!r} ({error}); expected a table written by "
            "'python -m rpsft_kernels tune'"
        ) from error
    return loaded


def tuned_architecture() -> str | None:
    """The architecture whose tile table RPSFT_TILES changes, or None."""
    return _load_tuned(os.environ.get("RPSFT_TILES", "")).get("architecture")


def forget_tuned() -> None:
    """Make the next call read the file of RPSFT_TILES again."""
    _load_tuned.cache_clear()
    tile_table.cache_clear()


def rank_class(rank: int) -> int:
    """The largest rank whose tile shapes are those of ``rank``; weights of one class may share a launch."""
    return next((bound for bound in _RANK_CLASSES if rank <= bound), _RANK_CLASSES[-1] + 1)


def rank_classes() -> tuple[int, ...]:
    """One rank of each class."""
    return (*_RANK_CLASSES, _RANK_CLASSES[-1] + 1)


def tile_config(architecture: str, phase: str, rank: int, operands: str, narrow: bool = False) -> TileConfig:
    """The tile shape of a phase for weights of ``rank``.

    Args:
        architecture: the name of a tile table.
        phase: one of ``PHASES``.
        rank: k.
        operands: the table's class of operands: ``"one part"`` (16-bit operands), ``"wide"`` (the same arithmetic on
            float32 weights or gradients), ``"bare"`` (a 16-bit W without W0), ``"parts"`` (several bfloat16 parts) or
            ``"strided"`` (nothing is aligned).
        narrow: the narrower tiles that the row also names, if it does.

    Raises:
        ValueError: the table, which RPSFT_TILES changes, has a row that is not complete, or that asks for a kernel that
            the architecture does not have.
    """
    classes = tile_table(architecture)[phase]
    while operands not in classes and operands != "one part":
        operands = _NEXT_CLASS.get(operands, "one part")
    row = next(row for row in classes[operands] if rank <= row["rank"])
    if narrow:
        others = row.get("narrow", {})
        if not set(others) <= {"block_n", "stages"}:
            raise ValueError(
                f"environment variable RPSFT_TILES: got narrow tiles of phase {phase!r} with "
                f"{', '.join(sorted(others))}, expected block_n and stages alone: with other steps the bits of C would "
                "depend on which weights share a launch"
            )
        row = row | others
    specialised = row.get("specialised", False)
    if specialised and architecture != _SPECIALISED:
        raise ValueError(
            f"environment variable RPSFT_TILES: got a specialised row of phase {phase!r} for {architecture}, expected "
            f"one for {_SPECIALISED}: no other GPU runs those kernels; leave 'specialised' out"
        )
    try:
        return TileConfig(**{name: row[name] for name in _CONFIG_NAMES}, specialised=specialised)
    except KeyError as error:
        raise ValueError(
            f"environment variable RPSFT_TILES: got a row of phase {phase!r} without {error}, expected a table written "
            "by 'python -m rpsft_kernels tune'; write it again"
        ) from None


def is_interpreted() -> bool:
    """Whether Triton runs in its interpreter.

    ``TRITON_INTERPRET=1`` was set when the kernels were imported, or is set now if they were not.

    This does not import triton: planning and kernels compiled ahead of time work without it.
    """
    tile = sys.modules.get(f"{__package__}.kernels.tile")
    if tile is not None:
        return bool(tile.INTERPRETED.value)
    # Triton's own list of words for yes.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
