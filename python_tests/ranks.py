"""Runs a function on several processes that form a gloo group, and brings back what each returned."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import queue
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A server that has imported everything forks the ranks: starting one takes a tenth of a second.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.tensor", "transformers", "rpsft_kernels"])
_SECONDS = 180


def run_ranks(size: int, function: Callable[..., Any], *arguments: Any, killed: tuple[int, ...] = ()) -> list[Any]:
    """``function(*arguments)`` on ``size`` ranks; its results in their order, None for ranks that were ``killed``.

    ``function`` must be a module's own. Fails with the traceback of any rank that raised.
    """
    results: Any = _context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            _context.Process(target=_rank, args=(rank, size, f"{folder}/store", results, function, arguments))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            found: dict[int, Any] = {}
            while len(found) < size - len(killed):
                try:
                    rank, failure, value = results.get(timeout=_SECONDS)
                except queue.Empty:
                    raise AssertionError(f"ranks {sorted(set(range(size)) - set(found))} did not answer") from None
                if failure is not None:
                    raise AssertionError(f"rank {rank} raised:\n{failure}")
                found[rank] = value
        finally:
            for process in ranks:
                process.join(timeout=10)
                process.kill()
    return [found.get(rank) for rank in range(size)]


def _rank(rank: int, size: int, store: str, results: Any, function: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", str(rank))
    try:
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=60),
        )
        value = function(*arguments)
        results.put((rank, None, value))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def scratch(folder: Path, name: str) -> str:
    return str(folder / name)
