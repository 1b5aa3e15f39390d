"""The facts about a device that launches are planned with: its table of tile shapes, and its multiprocessors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from .aot import dispatch as aot
from .aot.targets import DESCRIPTORS, cuda_architecture
from .tile_table import tuned_architecture
from .variants import Access


@dataclass(frozen=True)
class Profile:
    """An architecture's name (a table in ``tiles/``), its multiprocessors, and whether it reads through descriptors."""

    architecture: str
    multiprocessors: int
    descriptors: bool


def device_profile(device: torch.device) -> Profile:
    """The profile that launches on a device are planned with.

    A GPU has its own, or one with the tile table of the kernels compiled ahead of time that serve it; the CPU has the
    interpreter's.
    """
    profile = own_profile(device)
    if device.type == "cpu" or torch.version.hip is not None:
        return profile
    table = aot.table_for(device, profile.architecture, tuned_architecture())
    return profile if table == profile.architecture else _replace_table(profile, table)


@lru_cache(maxsize=64)
def _replace_table(profile: Profile, table: str) -> Profile:
    return Profile(table, profile.multiprocessors, DESCRIPTORS[table])


@lru_cache(maxsize=64)
def own_profile(device: torch.device) -> Profile:
    """The profile of a device of this kind, whatever kernels are installed."""
    if device.type == "cpu":
        # Few programs, so that each walks several tiles and weights, as on a GPU.
        return Profile("interpreter", 3, False)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Profile("gfx942", properties.multi_processor_count, False)
    architecture = cuda_architecture(properties.major * 10 + properties.minor)
    return Profile(architecture, properties.multi_processor_count, DESCRIPTORS[architecture])


def access_of(profile: Profile, aligned: bool, even: bool) -> Access:
    """The access of a launch: by descriptors where the architecture has them, else without masks where tiles divide."""
    descriptor = aligned and profile.descriptors
    return Access(aligned, descriptor, aligned and even and not descriptor)
