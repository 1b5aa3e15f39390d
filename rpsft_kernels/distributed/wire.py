"""The device through which a group sends: that of the tensors if the group has a backend for it, else another one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist

# Devices of the weights that groups hold, by the names of the groups.
_devices: dict[str, torch.device] = {}


def find_wire(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the device through which ``group`` sends tensors of ``device``.

    FSDP2's CPU offload keeps shards on the CPU, of which a group that was made for NCCL knows nothing.

    Raises:
        ValueError: the group serves no device that is there.
    """
    served = _served_kinds(group)
    if not served or device.type in served:
        return device
    if "cpu" in served:
        return torch.device("cpu")
    for kind in served:
        module: Any = getattr(torch, kind, None)
        if module is not None and module.is_available():
            bound = getattr(group, "bound_device_id", None)
            return bound if bound is not None else torch.device(kind, module.current_device())
    raise ValueError(
        f"process group: got one that serves {', '.join(served)} alone for tensors on {device}, expected a backend for "
        f'{device.type} too: init_process_group("cpu:gloo,cuda:nccl")'
    )


def _served_kinds(group: dist.ProcessGroup) -> list[str]:
    """Return the types of devices that a group has backends for, such as ``["cuda"]``; none if that is not known."""
    try:
        config = dist.get_backend_config(group)
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError):
        return []
    return [pair.partition(":")[0] for pair in config.split(",") if ":" in pair]


def remember_device(group: dist.ProcessGroup, device: torch.device) -> None:
    """Remember the device of a group's weights, for :func:`gather_objects`."""
    _devices[group.group_name] = device


def remembered_device(group: dist.ProcessGroup) -> torch.device:
    """Return the device of a group's weights, as far as it was remembered; else the CPU."""
    return _devices.get(group.group_name, torch.device("cpu"))


def gather_objects(value: object, group: dist.ProcessGroup) -> list[Any]:
    """Return every rank's ``value``, which is pickled.

    Backends of GPUs send through the current device: where the group's weights lie on a GPU, that one, and for a group
    of which no weights are known the one on which those of other groups lie. Processes that have not called
    ``torch.cuda.set_device`` would all send through the first.
    """
    known = next((device for device in reversed(_devices.values()) if device.index is not None), None)
    device = _devices.get(group.group_name, known)
    gathered: list[Any] = [None] * group.size()
    with nullcontext() if device is None or device.index is None else torch.get_device_module(device).device(device):
        dist.all_gather_object(gathered, value, group=group)
    return gathered
