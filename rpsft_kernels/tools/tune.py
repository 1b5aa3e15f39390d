"""Times tile shapes on a GPU, on demand: nothing in the package tunes by itself."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.operands import Operands
from ..ops.runs import open_run
from ..ops.triton.device import own_profile
from ..ops.triton.program import TritonProgram
from ..ops.triton.project_drift import plan_forward
from ..ops.triton.pull_back import plan_backward
from ..ops.triton.tile_table import forget_tuned, rank_class, tile_table

Timer = Callable[[Callable[[], None]], float]
_BLOCKS = ((64, 128, 64), (128, 128, 32), (128, 128, 64), (128, 256, 64), (256, 128, 64))
_STAGES = (2, 3, 4)


def _median_milliseconds(run: Callable[[], None]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=200, return_mode="median"))


def _candidates() -> list[dict[str, int]]:
    return [
        {"block_m": m, "block_n": n, "block_k": k, "warps": 8, "stages": stages, "blocks_per_sm": blocks}
        for m, n, k in _BLOCKS
        for stages in _STAGES
        for blocks in (1, 2)
    ]


def tune(
    shapes: Sequence[tuple[int, int]],
    rank: int,
    device: torch.device,
    candidates: Sequence[dict[str, int]] | None = None,
    timer: Timer = _median_milliseconds,
) -> dict[str, Any]:
    """Return the device's tile table with the fastest shapes for one layer's weights in bfloat16, base form.

    Args:
        shapes: (m, n) of each weight of one layer.
        rank: k; the rows for its rank class are tuned.
        device: the GPU.
        candidates: tile shapes to try beside the shipped one; a shape that does not compile or fit is passed over.
        timer: times a call, in milliseconds.

    Returns:
        A table as in ``tiles/``, with the phases that were tuned; :func:`write_table` writes it for RPSFT_TILES.
    """
    # Tune the device's own table, not that of installed kernels: the own one is in force under RPSFT_TILES.
    architecture = own_profile(device).architecture
    table: dict[str, Any] = json.loads(json.dumps(tile_table(architecture)))
    forward, backward = _workload(shapes, rank, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.json"
        phases = (("project", forward), ("drift", forward), ("pull", backward), ("gradient", backward))
        for phase, prepare in phases:
            rows = table[phase]["one part"]
            row = next(r for r in rows if rank_class(rank) <= r["rank"])
            times: list[tuple[float, dict[str, int]]] = []
            for candidate in ({k: v for k, v in row.items() if k != "rank"}, *(candidates or _candidates())):
                row.update(candidate)
                write_table(table, path)
                try:
                    times.append((_time_table(path, prepare, timer), dict(candidate)))
                except Exception as error:  # a shape for which compiler or driver raises is no candidate
                    if not times:
                        raise
                    print(f"{phase} {candidate}: passed over ({type(error).__name__})")
            best, chosen = min(times, key=lambda entry: entry[0])
            row.update(chosen)
            print(f"{phase}: {times[0][0]:.3f} ms as shipped, {best:.3f} ms with {chosen}")
    return table


def write_table(table: dict[str, Any], path: str | Path) -> None:
    """Write a tile table for the environment variable RPSFT_TILES."""
    Path(path).write_text(json.dumps(table, indent=1) + "\n")


def _time_table(path: Path, prepare: Callable[[], Callable[[], None]], timer: Timer) -> float:
    """Time what ``prepare`` gives with the tile table of ``path`` in force."""
    before = os.environ.get("RPSFT_TILES")
    os.environ["RPSFT_TILES"] = str(path)
    _forget()
    try:
        run = prepare()
        run()
        return timer(run)
    finally:
        if before is None:
            del os.environ["RPSFT_TILES"]
        else:
            os.environ["RPSFT_TILES"] = before
        _forget()


def _forget() -> None:
    forget_tuned()
    plan_forward.cache_clear()
    plan_backward.cache_clear()


def _workload(
    shapes: Sequence[tuple[int, int]], rank: int, device: torch.device
) -> tuple[Callable[[], Callable[[], None]], Callable[[], Callable[[], None]]]:
    """Make two functions that prepare the projection and the gradients of a layer with the tile table then in force."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).mul_(0.02).to(torch.bfloat16)

    pretrained = [random(*shape) for shape in shapes]
    weights = [base + 1e-3 * random(*base.shape) for base in pretrained]
    lefts, rights = [random(m, rank) for m, _ in shapes], [random(n, rank) for _, n in shapes]
    operands = Operands(weights, lefts, rights, pretrained)
    grads = [torch.zeros_like(weight) for weight in weights]
    drifts = [torch.randn(rank, rank, device=device) for _ in shapes]
    scales = [1.0] * len(shapes)

    def forward() -> Callable[[], None]:
        program = TritonProgram(device, [len(shapes)])

        def run() -> None:
            with open_run(program) as step:
                step.stage_projection(0, operands, keep=False)
                step.send()
                step.project(0)

        return run

    def backward() -> Callable[[], None]:
        program = TritonProgram(device, [len(shapes)])

        def run() -> None:
            with open_run(program) as step:
                staged = step.stage_pull_back(
                    0, range(len(shapes)), operands.for_pull_back(), grads, scales, True, drifts
                )
                step.send()
                step.pull_back_(staged)

        return run

    return forward, backward
