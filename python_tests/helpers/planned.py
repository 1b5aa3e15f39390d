"""Operations on the CPU that are planned for a GPU which is not there, with every launch handed to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton import launch as triton_launch
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.variants import Variant

Launched = Callable[[Variant, int, tuple[Tensor, ...]], None]


@contextmanager
def planned_for(profile: Profile, launched: Launched) -> Iterator[None]:
    """Plan what is computed inside the ``with`` block for ``profile``; ``launched`` is told the variant, the number of
    programs and the arguments of each launch when it would be queued.
    """

    def find_start(
        variant: Variant, programs: int, device: torch.device, arguments: tuple[Tensor, ...]
    ) -> Callable[[], None]:
        # Kernels compiled ahead of time are launched on no others.
        assert [argument.data_ptr() % 16 for argument in arguments] == [0] * len(arguments), variant.label()
        return lambda: launched(variant, programs, arguments)

    with profiled(profile), mock.patch.object(triton_launch, "find_start", find_start):
        yield


@contextmanager
def profiled(profile: Profile) -> Iterator[None]:
    """Plan what is computed inside the ``with`` block for ``profile``."""
    with mock.patch.object(triton_device, "device_profile", return_value=profile):
        yield
