"""The shipped tables of tile shapes, and what is known of an architecture by its name: compiling needs no more.

Neither torch nor triton is imported here: kernels are planned without the one and compiled without the other.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

_TABLES = Path(__file__).with_name("tiles")
PHASES = ("project", "drift", "pull", "gradient", "full")
_RANK_CLASSES = (32, 64, 128)


@dataclass(frozen=True)
class TileConfig:
    """One phase's tile shape, warps, pipeline stages and programs per multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    per_multiprocessor: int


# Whether an architecture reads aligned operands through tensor descriptors.
DESCRIPTORS = {"sm_80": False, "sm_86": False, "sm_90": True, "sm_100": True, "sm_120": True, "gfx942": False}


@lru_cache(maxsize=16)
def tile_table(architecture: str) -> dict[str, Any]:
    """The table of an architecture: phase -> operand class -> rows of (largest rank, tile config).

    ``RPSFT_TILES`` names a JSON file of the same form (written by ``python -m rpsft_kernels tune``) whose phases
    replace the shipped ones of its architecture.
    """
    table: dict[str, Any] = json.loads((_TABLES / f"{architecture}.json").read_text())
    loaded = _tuned(os.environ.get("RPSFT_TILES", ""))
    if loaded.get("architecture") == architecture:
        table.update({phase: loaded[phase] for phase in PHASES if phase in loaded})
    return table


@lru_cache(maxsize=4)
def _tuned(path: str) -> dict[str, Any]:
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
    return _tuned(os.environ.get("RPSFT_TILES", "")).get("architecture")


def forget_tuned() -> None:
    """Read the file of RPSFT_TILES again, which has changed."""
    _tuned.cache_clear()
    tile_table.cache_clear()


def rank_class(rank: int) -> int:
    """The rank by which tile shapes are chosen: weights of one class may share a launch."""
    return next((bound for bound in _RANK_CLASSES if rank <= bound), _RANK_CLASSES[-1] + 1)


def rank_classes() -> tuple[int, ...]:
    """One rank of each class."""
    return (*_RANK_CLASSES, _RANK_CLASSES[-1] + 1)


def tile_config(architecture: str, phase: str, rank: int, operands: str) -> TileConfig:
    """The tile shape of a phase for weights of ``rank`` whose operands are of a class of the table:

    ``"one part"`` (16-bit operands), ``"wide"`` (the same arithmetic on float32 weights or gradients), ``"parts"``
    (several bfloat16 parts) or ``"strided"`` (nothing is aligned).
    """
    classes = tile_table(architecture)[phase]
    rows = classes[operands] if operands in classes else classes["one part"]
    row = next(row for row in rows if rank <= row["rank"])
    return TileConfig(
        row["block_m"], row["block_n"], row["block_k"], row["warps"], row["stages"], row["per_multiprocessor"]
    )


def interpreted() -> bool:
    """Whether Triton runs in its interpreter: ``TRITON_INTERPRET=1`` when the kernels were imported, or would be now.

    Asked without importing triton, which planning and ahead-of-time kernels do without.
    """
    tile = sys.modules.get(f"{__package__}.tile")
    if tile is not None:
        return bool(tile.INTERPRETED.value)
    # What Triton takes for yes.
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
