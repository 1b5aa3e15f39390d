"""The self-test's cases launch every kernel that each shipped table can be asked for, small and at a size that fills a
GPU. Devices are made up here, and launches are only recorded.
"""

from __future__ import annotations

import pytest
import torch

from planned import planned_for
from rpsft_kernels.ops.selftest import cases
from rpsft_kernels.ops.selftest.cases import REPEATED, all_cases
from rpsft_kernels.ops.selftest.checks import Subject, call_once
from rpsft_kernels.ops.selftest.inputs import Source
from rpsft_kernels.ops.selftest.suite import Launches
from rpsft_kernels.ops.triton import launch
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import list_variants


@pytest.mark.parametrize("architecture", [*DESCRIPTORS, "interpreter"])
def test_every_listed_kernel_is_launched(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    profile = Profile(architecture, 132, DESCRIPTORS.get(architecture, False))
    # Nothing reads the numbers, and weights smaller than on a GPU have the same variants.
    monkeypatch.setattr(Source, "_normal", lambda self, rows, cols, scale: torch.empty(rows, cols))
    monkeypatch.setattr(
        cases, "_LARGE", {"even": (512, 768), "ragged": (520, 776), "odd": (521, 777), "others": (9, 9)}
    )
    subject = Subject("triton", torch.device("cpu"))
    small, large = Launches(profile), Launches(profile)
    for case in all_cases():
        with planned_for(profile, lambda *_: None), launch.watch_launches(small):
            for shape in case.small_shapes():
                call_once(case, subject, shape)
        if case.kind in REPEATED:
            with planned_for(profile, lambda *_: None), launch.watch_launches(large):
                # As many as it takes to fill the device: what they are projected by may differ from what one is.
                call_once(case, subject, case.large_shape(of_gpu=True), copies=2 * profile.multiprocessors)
                call_once(case, subject, case.large_shape(of_gpu=True))
    asked = small.tiles.keys() | large.tiles.keys()
    listed = set(list_variants(architecture, profile.descriptors, rank_classes()))
    assert {variant.label() for variant in listed - asked} == set()
    assert {variant.label() for variant in listed - large.tiles.keys()} == set()
    assert {variant.label() for variant in asked - listed} == set()
