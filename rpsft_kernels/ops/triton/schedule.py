"""The static schedule of one grouped launch: which program computes which tiles, in which order."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Tile rows that are walked together, so that the tiles that concurrent programs read stay in the second-level cache.
_BAND = 8


class Grid(NamedTuple):
    """The tiles of one weight: ``repeats`` times ``high`` x ``wide``, each of the same ``cost`` (any unit)."""

    high: int
    wide: int
    repeats: int
    cost: int

    @property
    def tiles(self) -> int:
        return self.high * self.wide * self.repeats


@dataclass(frozen=True, eq=False)
class Schedule:
    """``order`` lists tile numbers; run r covers ``order[begin:end]`` of weight w with ``runs[r] = (w, begin, end)``;
    program p executes runs ``starts[p] .. starts[p + 1]``. All int32.
    """

    starts: npt.NDArray[np.int32]
    runs: npt.NDArray[np.int32]
    order: npt.NDArray[np.int32]
    total_cost: int
    longest_cost: int

    @property
    def programs(self) -> int:
        return len(self.starts) - 1

    @property
    def programs_with_work(self) -> int:
        """The number of programs to launch: none for an empty schedule."""
        return self.programs if len(self.order) else 0

    @property
    def filled(self) -> float:
        """Share of the programs' time that tiles fill, until the last program ends."""
        return self.total_cost / (self.programs * self.longest_cost) if self.longest_cost else 1.0


def banded_order(grid: Grid) -> list[int]:
    """Tile numbers in bands of a few tile rows, walked column by column within a band."""
    order = []
    for top in range(0, grid.high, _BAND):
        rows = range(top, min(top + _BAND, grid.high))
        order += [row * grid.wide + col for col in range(grid.wide) for row in rows]
    area = grid.high * grid.wide
    return [repeat * area + tile for repeat in range(grid.repeats) for tile in order]


@lru_cache(maxsize=1024)
def build_schedule(grids: tuple[Grid, ...], programs: int, banded: bool) -> Schedule:
    """Deal the tiles of many weights to ``programs`` persistent programs, the costliest tiles first.

    Every tile goes to the program with the least to do (ties: the lowest number), so that concurrent programs
    hold neighbouring tiles and all end at nearly the same time. The result depends on the arguments alone.
    """
    programs = max(1, min(programs, sum(grid.tiles for grid in grids)))
    heap = [(0, p) for p in range(programs)]
    lists: list[list[tuple[int, list[int]]]] = [[] for _ in range(programs)]
    for weight in sorted(range(len(grids)), key=lambda w: -grids[w].cost):
        grid = grids[weight]
        tiles_of: dict[int, list[int]] = {}
        for tile in banded_order(grid) if banded else range(grid.tiles):
            load, program = heap[0]
            heapq.heapreplace(heap, (load + grid.cost, program))
            tiles_of.setdefault(program, []).append(tile)
        for program, tiles in tiles_of.items():
            lists[program].append((weight, tiles))
    starts = [0]
    runs: list[tuple[int, int, int]] = []
    order: list[int] = []
    for todo in lists:
        for weight, tiles in todo:
            runs.append((weight, len(order), len(order) + len(tiles)))
            order += tiles
        starts.append(len(runs))
    return Schedule(
        starts=np.array(starts, np.int32),
        runs=np.array(runs, np.int32).reshape(-1, 3),
        order=np.array(order, np.int32),
        total_cost=sum(grid.tiles * grid.cost for grid in grids),
        longest_cost=max(load for load, _ in heap),
    )


def splits_of(rows: int, rank: int, block_m: int, block_n: int) -> int:
    """The number of stretches of rows that ``U^T T`` is cut into: enough for about 32 tiles, none under 256 rows.

    A function of the shape alone: the bits of C must not depend on which weights share the launch.
    """
    tiles = -(-rank // block_m) * -(-rank // block_n)
    return max(1, min(-(-32 // tiles), rows // 256))
