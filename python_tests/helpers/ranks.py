"""Runs a function on several processes that form a gloo group, and brings back what each returned."""

from __future__ import annotations

import datetime
import faulthandler
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

# A server that has imported everything forks the ranks: starting one takes a tenth of a second.
_context = multiprocessing.get_context("forkserver")
_hides = [name for name in ("python_tests.helpers.without_triton",) if name in sys.modules]
_context.set_forkserver_preload([*_hides, "torch", "torch.distributed.tensor", "transformers", "rpsft_kernels"])
_SECONDS = 180
TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])
# On a GPU it does everywhere.
FSDP2_RUNS = hasattr(torch.cpu.Stream, "record_event")
needs_fsdp2 = pytest.mark.skipif(
    not FSDP2_RUNS, reason="FSDP2 of torch 2.6 does not run on CPUs: their stream has no record_event"
)
# The keeper of the store: a file; a server that outlives the ranks, as torchrun's does; or rank 0.
Keeper = Literal["file", "launcher", "rank 0"]


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *arguments: Any,
    killed: tuple[int, ...] = (),
    timeout: float = 60,
    keeper: Keeper = "file",
) -> list[Any]:
    """Run ``function(*arguments)`` on ``size`` ranks; returns results in their order, None for those ``killed``.

    ``function`` must be a module's own; ``timeout`` is the group's, in seconds. Fails with the traceback of any rank
    that raised.
    """
    results: Any = _context.Queue()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if keeper == "launcher" else None
    with tempfile.TemporaryDirectory() as folder:
        place = (f"{folder}/store", keeper, None if server is None else server.port)
        ranks = [
            _context.Process(target=_rank, args=(rank, size, place, timeout, results, function, arguments))
            for rank in range(size)
        ]
        for process in ranks:
            process.start()
        try:
            found: dict[int, Any] = {}
            while len(found) < size - len(killed):
                rank, failure, value = _next(results, ranks, {*found, *killed}, folder)
                if failure is not None:
                    raise AssertionError(f"rank {rank} raised:\n{failure}")
                found[rank] = value
        finally:
            for process in ranks:
                process.join(timeout=10)
                process.kill()
    return [found.get(rank) for rank in range(size)]


def _next(results: Any, ranks: list[Any], done: set[int], folder: str) -> Any:
    """Wait for the next answer of a rank that is not ``done``."""
    until = time.monotonic() + _SECONDS
    while time.monotonic() < until:
        # Read before the queue is: what a rank says before it ends arrives.
        ended = {i: process.exitcode for i, process in enumerate(ranks) if i not in done and process.exitcode}
        try:
            return results.get(timeout=1)
        except queue.Empty:
            if ended:
                raise AssertionError(f"exit codes of ranks: {ended}\n{_stacks(folder, set(ended))}") from None
    left = set(range(len(ranks))) - done
    raise AssertionError(f"ranks {sorted(left)} did not answer\n{_stacks(folder, left)}")


def _stacks(folder: str, ranks: set[int]) -> str:
    """Return the stacks of ranks that crashed, or that had not ended near the timeout."""
    paths = {rank: Path(folder, f"stack.{rank}") for rank in sorted(ranks)}
    return "\n".join(f"rank {rank}:\n{path.read_text()}" for rank, path in paths.items() if path.is_file())


def _rank(
    rank: int,
    size: int,
    place: tuple[str, Keeper, int | None],
    timeout: float,
    results: Any,
    function: Callable[..., Any],
    arguments: Any,
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("LOCAL_RANK", str(rank))
    log = Path(place[0]).with_name(f"stack.{rank}").open("w")
    faulthandler.enable(log)
    faulthandler.dump_traceback_later(_SECONDS - 10, file=log)
    try:
        dist.init_process_group(
            "gloo",
            store=_store(rank, size, *place),
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout),
        )
        results.put((rank, None, function(*arguments)))
    except BaseException:
        results.put((rank, traceback.format_exc(), None))
    results.close()
    results.join_thread()
    # Not destroy_process_group: torch 2.6 holds the interpreter's lock while it waits for gloo's threads, which may
    # want it. Nor an orderly exit, which destroys the group too.
    os._exit(0)


def _store(rank: int, size: int, path: str, keeper: Keeper, port: int | None) -> dist.Store:
    file = dist.FileStore(path, size)
    if keeper == "file":
        return file
    if keeper == "rank 0":
        if rank == 0:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            file.set("port", str(store.port))
            return store
        port = int(file.get("port"))
    assert port is not None
    return dist.TCPStore("127.0.0.1", port, is_master=False)
