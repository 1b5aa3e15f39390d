"""Writes sharded anchors: each rank the file of those that it holds, and the first rank an index."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..distributed import Shard, gather_objects, remember_device
from ..low_rank.start import name_pieces
from .file_format import Contents, write_anchors
from .load import INDEX
from .together import refuse_together
from .whole_file import remove_stale, write_whole


def save_sharded(path: str | os.PathLike[str], contents: Contents) -> None:
    """Write the folder; every rank of the job makes this call. The index comes last: without it a folder is no save.

    Rows of U and V that several ranks hold are written by the first of them.

    A symbolic link to a folder is followed.

    Raises:
        ValueError: ``path`` is a file, or lies in a folder that does not exist; or a rank could not write.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    everyone: Any = dist.group.WORLD
    device = next((anchor.device for anchor in contents.anchors.values() if anchor.device.type != "cpu"), None)
    if device is not None:
        remember_device(everyone, device)
    with refuse_together({"": everyone}, "path: the anchors were not saved"):
        folder = Path(os.path.realpath(path)) if os.path.islink(path) else Path(path)
    held = gather_objects({name: anchor.held for name, anchor in contents.anchors.items()}, everyone)
    problem = ""
    if rank == 0:
        try:
            _make_folder(folder, path)
        except OSError as error:
            problem = f"path: the anchors were not saved: rank {rank}: {error}"
        except ValueError as error:
            problem = str(error)
    # What the first rank says counts.
    problem, save_id = gather_objects((problem, uuid.uuid4().hex), everyone)[0]
    if problem:
        raise ValueError(problem)
    name = f"rank-{rank:05d}-of-{size:05d}.safetensors"
    try:
        write_anchors(folder / name, contents, _pieces_of_earlier_ranks(held, rank, contents), save_id)
    except Exception as error:
        # Whatever it is, the other ranks wait for the outcome.
        problem = f"rank {rank}: {_describe(error)}"
    outcomes = gather_objects((problem, name), everyone)
    problems = [outcome[0] for outcome in outcomes if outcome[0]]
    if problems:
        raise ValueError(f"path: the anchors were not saved: {'; '.join(problems)}")
    if rank == 0:
        try:
            with write_whole(folder / INDEX) as file:
                file.write(json.dumps({"files": [outcome[1] for outcome in outcomes]}).encode())
        except Exception as error:
            problem = f"rank {rank}: {_describe(error)}"
    problem = gather_objects(problem, everyone)[0]
    if problem:
        raise ValueError(f"path: the anchors were not saved: {problem}")


def _describe(error: Exception) -> str:
    return str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"


def _make_folder(folder: Path, path: str | os.PathLike[str]) -> None:
    if not folder.is_dir() and (folder.exists() or folder.is_symlink() or not folder.parent.is_dir()):
        raise ValueError(
            f"path: got {str(path)!r}, expected a folder, new or of an earlier save, in one that exists: anchors "
            "of a sharded model are saved as one file per rank"
        )
    folder.mkdir(exist_ok=True)
    # Until the new index is there, the folder is no save: its files are being replaced.
    (folder / INDEX).unlink(missing_ok=True)
    # Also those of earlier saves by another number of ranks.
    remove_stale(folder, r"rank-\d+-of-\d+\.safetensors")


def _pieces_of_earlier_ranks(held: list[dict[str, Shard]], rank: int, contents: Contents) -> set[tuple[str, str]]:
    """Return the (weight, piece) that a rank before ``rank`` writes."""
    left_out = set()
    for name, shard in held[rank].items():
        earlier = [shards[name] for shards in held[:rank] if name in shards]
        if any(other.rows == shard.rows for other in earlier):
            left_out.add((name, "left"))
        if any(other.cols == shard.cols for other in earlier):
            left_out.add((name, "right"))
        if shard in earlier:
            left_out |= {(name, "base"), (name, "block")}
            left_out |= {(name, piece) for piece in name_pieces(contents.anchors[name].starts)}
    return left_out
