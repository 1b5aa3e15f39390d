"""The ranks' part in the tests of anchors that several ranks make, save and load."""

from __future__ import annotations

import dataclasses
import errno
import os
import resource
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rpsft_kernels as rk
import rpsft_kernels.anchors.build as build_module
import rpsft_kernels.anchors.file_format as file_format
import rpsft_kernels.anchors.save as save_module
import rpsft_kernels.anchors.verify as verify_module
from fsdp2_ranks import wrapped as fully_sharded
from llama import RANK, drift, expected, llama, whole_anchors
from rpsft_kernels.distributed import find_parameters


def wrapped(model: Any, layout: str) -> Any:
    if layout == "whole":
        return model
    if layout == "replicated":
        return DistributedDataParallel(model)
    if layout == "flat":
        from fsdp1_ranks import wrapped as flat_sharded

        return flat_sharded(model)
    return fully_sharded(model, dim=1 if layout == "columns" else 0)


def made(layout: str, **options: Any) -> rk.Anchors:
    return rk.Anchors.from_model(wrapped(llama(), layout), RANK, progress=False, **options)


def save(layout: str, path: str, options: dict[str, Any]) -> tuple[int, list[int]]:
    """Save the anchors; returns their bytes here, and those that :meth:`Anchors.memory` planned."""
    model = wrapped(llama(), layout)
    planned = rk.Anchors.memory(model, RANK, **options).per_rank
    anchors = rk.Anchors.from_model(model, RANK, progress=False, **options)
    anchors.save(path)
    return anchors.nbytes, list(planned)


def load(layout: str, path: str, options: dict[str, Any]) -> dict[str, Any]:
    """Load anchors for another layout; returns R at the anchor, and after a drift against float64."""
    model = wrapped(llama(), layout)
    anchors = rk.Anchors.load(path, model)
    result: dict[str, Any] = {"bytes": anchors.nbytes, "skipped": dict(anchors.skipped)}
    with torch.no_grad():
        result["at anchor"] = rk.rotation_penalty(model, anchors).item()
        moved = llama()
        drift(moved)
        move_to(model, moved)
        found = rk.rotation_penalty(model, anchors).item()
    reference = whole_anchors(llama(), **{k: v for k, v in options.items() if k != "keep_base"})
    result["penalty"] = found / expected(moved, reference)[0] - 1
    try:
        rk.Anchors.load(path, model)
        result["refused"] = False
    except ValueError as error:
        result["refused"] = "got other values" in str(error)
    try:
        result["unverified"] = rk.Anchors.load(path, model, verify=False).nbytes
    except ValueError as error:
        result["unverified"] = str(error)
    return result


@torch.no_grad()
def move_to(model: nn.Module, moved: nn.Module) -> None:
    """Give the shards that lie here the values of the whole model ``moved``."""
    whole = dict(moved.named_parameters())
    for name, found in find_parameters(model).items():
        if name in whole and len(found.shape) == 2:
            weight = found.locate(name)
            if weight.shard.numel:
                weight.values().copy_(weight.shard.of(whole[name]))


def spoil(layout: str) -> str:
    """Return this rank's error where rank 1 alone has a weight that cannot be anchored."""
    model = wrapped(llama(), layout)
    if dist.get_rank() == 1:
        with torch.no_grad():
            for name, found in find_parameters(model).items():
                if name == "model.layers.1.mlp.up_proj.weight":
                    found.locate(name).values()[0] = float("nan")
    try:
        rk.Anchors.from_model(model, RANK, progress=False)
    except ValueError as error:
        return str(error)
    return ""


def unwritable(path: str) -> str:
    anchors = made("rows")
    if dist.get_rank() == 1:
        rank = dist.get_rank()
        os.makedirs(f"{path}/rank-{rank:05d}-of-{dist.get_world_size():05d}.safetensors")
    dist.barrier()
    try:
        anchors.save(path)
    except ValueError as error:
        return str(error)
    return ""


def save_to_a_full_disk(path: str, full_rank: int) -> str:
    """Return this rank's error where ``full_rank`` alone can write no more than a kilobyte to a file."""
    anchors, limits = made("rows"), resource.getrlimit(resource.RLIMIT_FSIZE)
    # The ranks' messages to each other go through files too.
    write = file_format.write_piece

    def write_to_a_full_disk(file: Any, piece: torch.Tensor) -> dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        try:
            file.write(b"0" * 2048)
            file.flush()
            return write(file, piece)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    if dist.get_rank() == full_rank:
        file_format.write_piece = write_to_a_full_disk
    try:
        anchors.save(path)
    except ValueError as error:
        return str(error)
    finally:
        file_format.write_piece = write
    return ""


def save_without_index(path: str) -> str:
    """Return this rank's error where the first rank cannot write the index."""
    anchors = made("rows")

    def refuse(target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write, save_module.write_whole = save_module.write_whole, refuse  # type: ignore[assignment]
    try:
        anchors.save(path)
    except ValueError as error:
        return str(error)
    finally:
        save_module.write_whole = write
    return ""


def save_and_load(path: str) -> int:
    anchors = made("rows")
    anchors.save(path)
    return rk.Anchors.load(path, wrapped(llama(), "rows")).nbytes - anchors.nbytes


def save_made(path: str) -> str:
    try:
        made("rows").save(path)
    except ValueError as error:
        return str(error)
    return ""


def fail_to_solve(error: str) -> str:
    """Return this rank's error where no solver of rank 1 works."""
    model = wrapped(llama(), "rows")

    def fail(matrix: torch.Tensor) -> None:
        raise torch.linalg.LinAlgError(error) if error else MemoryError("no memory")

    eigh, svd = torch.linalg.eigh, torch.linalg.svd
    if dist.get_rank() == 1:
        torch.linalg.eigh = torch.linalg.svd = fail
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rk.Anchors.from_model(model, RANK, progress=False)
    except (RuntimeError, ValueError) as raised:
        return f"{type(raised).__name__}: {raised}"
    finally:
        torch.linalg.eigh, torch.linalg.svd = eigh, svd
    return ""


def load_where_one_rank_fails(layout: str, path: str, other: str) -> str:
    """Return this rank's error where rank 1 loads ``other``."""
    model = wrapped(llama(), layout)
    try:
        rk.Anchors.load(other if dist.get_rank() == 1 else path, model)
    except (OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def anchor_where_one_rank_refuses(layout: str, options: dict[str, Any]) -> str:
    """Return this rank's error where rank 1 alone has ``options``."""
    model = wrapped(llama(), layout)
    try:
        rk.Anchors.from_model(model, **{"rank": RANK, "progress": False, **(options if dist.get_rank() == 1 else {})})
    except ValueError as error:
        return str(error)
    return ""


def choose_all(layout: str, path: str, cases: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [_choose(layout, f"{path}-{i}", rank, options) for i, (rank, options) in enumerate(cases)]


def _choose(layout: str, path: str, rank: float, options: dict[str, Any]) -> dict[str, Any]:
    """Compare anchors of shards, made here and loaded, with those of the whole model; returns what was found."""
    model = wrapped(llama(), layout)
    counted = {name: options[name] for name in ("keep_base", "basis_dtype") if name in options}
    planned = rk.Anchors.memory(model, rank, **counted).per_rank
    anchors = rk.Anchors.from_model(model, rank, progress=False, **options)
    whole = rk.Anchors.from_model(llama(), rank, progress=False, **options)
    anchors.save(path)
    loaded = rk.Anchors.load(path, model, verify=False)
    for name, anchor in anchors.items():
        reference, again = whole[name], loaded[name]
        for facts in (reference, again):
            assert (anchor.rank, anchor.form, anchor.energy) == (facts.rank, facts.form, facts.energy), name
            assert (anchor.share, anchor.random_seed) == (facts.share, facts.random_seed), name
        assert anchor.part == again.part, name
        for piece, tensor in anchor.pieces().items():
            assert torch.equal(tensor, again.pieces()[piece]), (name, piece)
        for side, span in ((anchor.left, anchor.held.rows), (anchor.right, anchor.held.cols)):
            if side is not None:
                expected = reference.left if side is anchor.left else reference.right
                assert expected is not None and torch.equal(side, expected[slice(*span)]), name
    with torch.no_grad():
        at_anchor = rk.rotation_penalty(model, anchors).item()
        moved = llama()
        drift(moved)
        move_to(model, moved)
        values = [rk.rotation_penalty(model, a).item() for a in (anchors, loaded)]
        alone = rk.rotation_penalty(moved, whole).item()
        # Whole anchors divide the work as those of shards do.
        if layout == "replicated" and options.get("keep_base", True):
            values.append(rk.rotation_penalty(model, whole).item())
    return {
        "at anchor": at_anchor,
        "R": values,
        "error": values[0] / alone - 1,
        "ranks": sorted({a.rank for a in anchors.values()}),
        "within": anchors.nbytes <= planned[0],
    }


def _caught(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail_alone(layout: str, path: str) -> dict[str, list[str]]:
    """Return this rank's errors, where rank 1 alone fails in each way, and those of the right call after it."""
    odd = dist.get_rank() == 1
    model: Any = _partly_local()
    if layout == "replicated":
        model = DistributedDataParallel(model)
    else:
        for layer in model.layers:
            fully_shard(layer)
    whole = rk.Anchors.from_model(_partly_local(), 6, progress=False)
    parts = rk.Anchors.from_model(model, 6, progress=False)
    blocks = rk.Anchors.from_model(model, 6, progress=False, keep_base=False)
    foreign = rk.Anchors(
        {n: dataclasses.replace(anchor, arithmetic=anchor.arithmetic and "another") for n, anchor in blocks.items()},
        fingerprints=blocks.fingerprints,
    )
    name = "layers.2.weight"

    def fail(*_: Any, **__: Any) -> NoReturn:
        raise MemoryError("no memory")

    def anchor() -> None:
        rk.Anchors.from_model(model, 6, progress=False)

    def spoil(name: str) -> Callable[[], None]:
        weight = find_parameters(model)[name].locate(name)

        saved = weight.values().detach().clone()

        def undo() -> None:
            with torch.no_grad():
                weight.values().copy_(saved)

        with torch.no_grad():
            weight.values().fill_(float("nan"))
        return undo

    def replace(owner: object, attribute: str) -> Callable[[], None]:
        saved = getattr(owner, attribute)
        setattr(owner, attribute, fail)
        return lambda: setattr(owner, attribute, saved)

    kept = [n for n in parts if n != name]
    fewer = rk.Anchors({n: parts[n] for n in kept}, fingerprints={n: parts.fingerprints[n] for n in kept})
    cases: dict[str, tuple[Callable[[], Callable[[], None]], Callable[[], object]]] = {
        "verify, values": (lambda: spoil(name), lambda: parts.verify(model)),
        "verify, values, whole anchors": (lambda: spoil(name), lambda: whole.verify(model)),
        "verify, a local weight": (lambda: spoil("local.weight"), lambda: parts.verify(model)),
        "verify, memory": (lambda: replace(verify_module, "content_sum"), lambda: parts.verify(model)),
        "verify, other anchors": (lambda: lambda: None, lambda: (fewer if odd and not right else parts).verify(model)),
        "rebuilt": (lambda: replace(rk.Anchor, "rebuilt_block"), lambda: foreign.rebuilt(model)),
        "from_model, a local weight": (lambda: spoil("local.weight"), anchor),
        "from_model, memory for shards": (lambda: replace(build_module, "anchor_fields"), anchor),
        "from_model, memory to gather": (lambda: replace(build_module.Transfer, "send"), anchor),
        "from_model, memory to receive": (lambda: replace(build_module._Round, "_empty_basis"), anchor),
        "save": (lambda: lambda: None, lambda: parts.save(None if odd and not right else path)),  # type: ignore[arg-type]
    }
    found = {}
    for case, (prepare, call) in cases.items():
        right = False
        undo = prepare() if odd else lambda: None
        message = _caught(call)
        undo()
        right = True
        found[case] = [message, _caught(call)]
    return found


def _partly_local() -> nn.Module:
    """A model with a weight that neither DDP nor FSDP2 keeps on several ranks."""
    torch.manual_seed(3)
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(40, 32, bias=False) for _ in range(3))
    model.local = nn.Linear(40, 32, bias=False)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["local.weight"])
    return model
