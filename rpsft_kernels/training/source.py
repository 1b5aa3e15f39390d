"""Where a penalty's anchors come from: those at hand, a file, or the model as it is before training."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..anchors.collection import Anchors
from ..anchors.load import INDEX
from ..anchors.together import find_groups
from ..distributed import find_parameters
from .asked import check_asked
from .settings import Settings

# What trainers write beside the weights that they have trained.
_TRACES = (
    "trainer_state.json",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "adapter_model.safetensors",
    "adapter_model.bin",
)


def provide_anchors(settings: Settings, model: nn.Module, resuming: bool) -> Anchors:
    """Return the anchors of a model, on its devices.

    A file at ``settings.path`` is loaded, else the model is anchored as it is now, and the file is written. Every rank
    makes this call.

    Args:
        resuming: whether the model has been trained since it was anchored: it is not compared with the file then.

    Warns:
        UserWarning: the model was loaded from the folder of a trainer's checkpoint, and is anchored.

    Raises:
        ValueError: as ``Anchors.load`` and ``Anchors.from_model``; or there is neither a file nor a rank, or anchors
            that are not what the settings ask for.
    """
    if settings.anchors is not None:
        check_asked(settings.anchors, settings, model)
        return follow(settings.anchors, model)
    if settings.path is not None and _exists_everywhere(settings.path, model):
        anchors = _load(settings.path, model, resuming)
        check_asked(anchors, settings, model)
        return follow(anchors, model)
    if settings.rank is None:
        raise ValueError(
            f"rank: got None, and there is no file {str(settings.path)!r}, expected an int k or a share of energy to "
            "anchor the model with, or the path of anchors that were saved (Anchors.save)"
        )
    if resuming:
        raise ValueError(
            "path: got no saved anchors for a run that is resumed, expected those that it began with: the weights at "
            "hand have been trained, and R would begin at 0 again. Pass the file (path=, or "
            "anchors=rk.Anchors.load(file, model, verify=False)), or call anchor(model) with the pretrained model "
            "before the checkpoint is loaded"
        )
    _warn_of_checkpoint(model)
    # A rank that is a share of energy is the business of from_model.
    anchors = Anchors.from_model(model, settings.rank, progress=False, **settings.anchor_options())  # type: ignore[arg-type]
    if settings.path is not None:
        _save(anchors, settings.path)
    return anchors


def follow(anchors: Anchors, model: nn.Module) -> Anchors:
    """Return the anchors on the devices of their weights; the same ones if they are there."""
    parameters = find_parameters(model)
    devices = {parameter.device for parameter in model.parameters()}
    moved = {}
    for name, anchor in anchors.items():
        if name in parameters:
            moved[name] = anchor.to(parameters[name].locate(name).device)
        else:
            # The base of an adapter has another name; it lies with the rest.
            moved[name] = anchor.to(devices.copy().pop()) if len(devices) == 1 else anchor
    if all(moved[name] is anchors[name] for name in moved):
        return anchors
    return Anchors(moved, fingerprints=anchors.fingerprints, skipped=anchors.skipped)


def _load(path: str | os.PathLike[str], model: nn.Module, resuming: bool) -> Anchors:
    device = next((p.device for p in model.parameters() if p.is_floating_point()), torch.device("cpu"))
    if resuming:
        return Anchors.load(path, model, device=device, verify=False)
    try:
        return Anchors.load(path, model, device=device)
    except ValueError as error:
        raise ValueError(
            f"{error}\nThe anchors of this run are loaded from path={os.fspath(path)!r}, and the model was compared "
            "with them because nothing was resumed. A run that goes on from a checkpoint: load the penalty's state "
            "first (load_state_dict), or pass anchors=rk.Anchors.load(path, model, verify=False). Another model: use "
            "another path"
        ) from error


def _exists_everywhere(path: str | os.PathLike[str], model: nn.Module) -> bool:
    """Whether there are anchors at a path.

    Raises:
        ValueError: some ranks see them, and others do not.
    """
    place = Path(path)
    exists = place.is_file() or (place / INDEX).is_file()
    for group in find_groups(model).values():
        answers: list[Any] = [None] * group.size()
        dist.all_gather_object(answers, exists, group=group)
        if len(set(answers)) > 1:
            seen = [dist.get_global_rank(group, i) for i, answer in enumerate(answers) if answer]
            raise ValueError(
                f"path: got anchors at {os.fspath(path)!r} that ranks {seen} see and others do not, expected a folder "
                "that all ranks share, or copies on all of them"
            )
    return exists


def _save(anchors: Anchors, path: str | os.PathLike[str]) -> None:
    """Write the file: parts by all ranks together, whole anchors, which every rank has, by the first one."""
    whole = all(anchor.part is None for anchor in anchors.values())
    if whole and dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    anchors.save(path)


def _warn_of_checkpoint(model: nn.Module) -> None:
    for module in model.modules():
        folder = getattr(getattr(module, "config", None), "_name_or_path", None)
        if not isinstance(folder, str) or not os.path.isdir(folder):
            continue
        traces = [name for name in _TRACES if os.path.exists(os.path.join(folder, name))]
        if traces:
            warnings.warn(
                f"model: got weights from {folder!r}, which a trainer wrote ({', '.join(traces)}), expected the "
                "pretrained ones: anchored now, R is measured from this checkpoint on, and what was learned before "
                "counts as pretrained. A resumed run needs the anchors that it began with: "
                "anchors=rk.Anchors.load(their file). Where a stage of its own begins here, "
                "anchors=rk.Anchors.from_model(model, rank) says so",
                UserWarning,
                stacklevel=4,
            )
            return
