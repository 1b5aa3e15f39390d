"""Which launches the warp-specialised kernels serve, and how these are planned. The kernels run in test_emulated."""

from __future__ import annotations

import pytest

from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.layout import ProjectKey, PullKey
from rpsft_kernels.ops.triton.project_drift import ForwardPlan, plan_forward
from rpsft_kernels.ops.triton.pull_back import BackwardPlan, plan_backward
from rpsft_kernels.ops.triton.tile_table import rank_class, rank_classes
from rpsft_kernels.ops.triton.variants import SPECIALISED, Precision, TypeName, list_variants
from rpsft_kernels.tools.schedule import contiguous_problem

H200 = Profile("sm_90", 132, True)
BASE_FORM = Precision("bf16", "bf16", "bf16")


def forward(*shapes: tuple[int, int], rank: int, precision: Precision = BASE_FORM, aligned: bool = True) -> ForwardPlan:
    problems = tuple(contiguous_problem(*shape, rank) for shape in shapes)
    key = ProjectKey(precision, rank_class(rank), False, False, aligned)
    return plan_forward(H200, key, problems, precision.base is None, aligned)


def backward(
    *shapes: tuple[int, int], rank: int, basis: TypeName = "bf16", aligned: bool = True, grad_aligned: bool = True
) -> BackwardPlan:
    problems = tuple(contiguous_problem(*shape, rank) for shape in shapes)
    key = PullKey(basis, "bf16", rank_class(rank), False, False, aligned, grad_aligned)
    return plan_backward(H200, key, problems, aligned, True)


@pytest.mark.parametrize("rank", rank_classes())
def test_aligned_weights_with_bases_in_bfloat16_are_theirs(rank: int) -> None:
    for weight in ("bf16", "fp16", "fp32"):
        for base in (None, "bf16", "fp32"):
            plan = forward((512, 1024), rank=rank, precision=Precision(weight, base, "bf16"))
            plain = weight == "fp32" and base is None
            assert plan.project.kernel == ("project" if plain else "hopper_project")
    plan = backward((512, 1024), rank=rank)
    assert (plan.pull.kernel, plan.gradient.kernel) == ("hopper_pull", "hopper_gradient")
    # C is rounded before it is read.
    assert len(plan.schedules) == 3


def test_the_plain_kernels_serve_everything_else() -> None:
    assert forward((512, 1024), rank=64, aligned=False).project.kernel == "project"
    assert forward((512, 1024), rank=64, precision=Precision("bf16", "bf16", "fp32")).project.kernel == "project"
    plan = backward((512, 1024), rank=64, aligned=False)
    assert (plan.pull.kernel, plan.gradient.kernel, len(plan.schedules)) == ("pull", "gradient", 2)
    assert backward((512, 1024), rank=64, basis="fp32").pull.kernel == "pull"
    plan = backward((512, 1024), rank=64, grad_aligned=False)
    assert (plan.pull.kernel, plan.gradient.kernel) == ("hopper_pull", "gradient")
    for architecture in ("sm_80", "sm_86", "sm_100", "sm_120"):
        kernels = {variant.kernel for variant in list_variants(architecture, architecture > "sm_90", rank_classes())}
        assert kernels.isdisjoint(SPECIALISED)


def test_narrow_tiles_where_wide_ones_leave_multiprocessors_idle() -> None:
    def width(*shapes: tuple[int, int], rank: int = 768) -> int:
        return forward(*shapes, rank=rank).project.blocks[1]

    assert width((4096, 4096)) == 256
    assert width((1024, 4096)) == 128
    assert width(*[(1024, 4096)] * 16) == 256
    # Three tiles of 128 have fewer columns than two of 256, and take longer all the same.
    assert width(*[(4096, 4096)] * 16, rank=320) == 256
    assert width((4096, 4096), rank=320) == 128
    assert forward((1024, 4096), rank=768).columns["PLANES_ROW"] == [768]


def test_wide_weights_are_cut_and_every_stretch_has_planes() -> None:
    narrow, wide = forward((2048, 8192), rank=128), forward((2048, 128256), rank=128)
    assert narrow.columns["STRETCHES"] == [1] and wide.columns["STRETCHES"] == [4]
    assert wide.planes_size == 4 * narrow.planes_size
    assert wide.columns["SPLITS"] == [4 * narrow.columns["SPLITS"][0]]
    assert len(wide.project_schedule.order) == 4 * len(narrow.project_schedule.order)
    plain = forward((2048, 128256), rank=128, precision=Precision("bf16", "bf16", "fp32"))
    assert plain.columns["STRETCHES"] == [1]


def test_a_weight_is_cut_alike_beside_any_others() -> None:
    alone = forward((2048, 40000), rank=768)
    together = forward((2048, 40000), *[(1024, 4096)] * 15, rank=768)
    for name in ("STRETCHES", "SPLITS"):
        assert alone.columns[name][0] == together.columns[name][0]


def test_programs_are_launched_with_whole_units_of_registers() -> None:
    for variant in list_variants("sm_90", True, rank_classes()):
        if variant.kernel in SPECIALISED:
            # Two consumers and a producer of 128 threads each, which share out 3 x 168 registers.
            assert (variant.warps, variant.blocks_per_sm, variant.registers) == (4, 1, 168)
