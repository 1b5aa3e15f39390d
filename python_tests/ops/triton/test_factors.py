"""Products of low-rank factors with bases against float64: interpreted, planned for every GPU, and emulated for 9.0."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from compiling import Compiler
from emulation import NEWEST, WHY_NEWEST, Emulator
from planned import planned_for
from rpsft_kernels.anchors.tensors import pad_rows
from rpsft_kernels.ops.triton import factors as factor_products
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.program import TritonProgram
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import SPECIALISED, Variant, list_variants
from support import relative_error

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Columns of the factors of one batch.
COLUMNS = (72, 136, 260)


class Batch(NamedTuple):
    factors: list[Tensor]
    bases: list[Tensor]


def make(r: int, k: int, dtype: torch.dtype, basis: torch.dtype, device: torch.device, mixed: bool = True) -> Batch:
    """Factors (r, n), of which one lies transposed and one has gaps between its columns."""
    factors = [torch.randn(r, n).to(dtype) for n in COLUMNS]
    factors[1] = factors[1].T.contiguous().T
    if mixed:
        factors[2] = torch.randn(r, 2 * COLUMNS[2]).to(dtype)[:, ::2]
    bases = [pad_rows((torch.randn(n, k) / n**0.5).to(basis)) for n in COLUMNS]
    return Batch([f.to(device) for f in factors], [pad_rows(b.to(device)) for b in bases])


def project(batch: Batch, repeats: int = 1) -> Tensor:
    program = TritonProgram(batch.factors[0].device, [len(batch.factors)])
    for _ in range(repeats):
        run = program.begin()
        operation = run.stage_factors(0, *batch)
        run.send()
        images = run.project_factors(operation)
        program.end(run)
    return images


def add(grads: Sequence[Tensor], coefficients: Tensor, bases: Sequence[Tensor]) -> None:
    program = TritonProgram(grads[0].device, [len(grads)])
    run = program.begin()
    operation = run.stage_factor_gradients(0, grads, bases)
    run.send()
    run.add_factors_(operation, coefficients)
    program.end(run)


def check_images(batch: Batch, images: Tensor) -> None:
    for factor, basis, image in zip(*batch, images, strict=True):
        # T has the accuracy of float32 whatever the dtypes: nothing is rounded but the sums.
        assert relative_error(image, factor.double() @ basis.double()) < 1e-6


def check_added(
    before: Sequence[Tensor], grads: Sequence[Tensor], coefficients: Tensor, bases: Sequence[Tensor]
) -> None:
    for old, new, x, basis in zip(before, grads, coefficients, bases, strict=True):
        product_ = x.double() @ basis.double().T
        # X is rounded once where bases are in bfloat16; then the sum is, to the gradient's dtype.
        allowed = (2.0**-8 if basis.dtype == BF16 else 1e-6) * product_.norm()
        exact = old.double() + product_
        allowed += torch.finfo(new.dtype).eps * exact.norm()
        assert float((new.double() - exact).norm()) <= float(allowed)


@pytest.mark.parametrize("basis", [BF16, FP32], ids=str)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("r", "k"), [(1, 3), (16, 48), (43, 136)])
def test_factors_against_float64(r: int, k: int, dtype: torch.dtype, basis: torch.dtype, device: torch.device) -> None:
    batch = make(r, k, dtype, basis, device)
    images = project(batch, repeats=2)
    assert images.shape == (len(COLUMNS), r, k) and images.dtype == FP32
    check_images(batch, images)
    assert torch.equal(images, project(batch)), "bits repeat"
    grads = [torch.randn_like(factor) for factor in batch.factors]
    before = [grad.clone() for grad in grads]
    coefficients = torch.randn(len(grads), r, k, device=device)
    add(grads, coefficients, batch.bases)
    check_added(before, grads, coefficients, batch.bases)


def test_nothing_beside_a_gradient_is_written(device: torch.device) -> None:
    batch = make(5, 24, FP32, BF16, device)
    frames = [torch.full((9, 2 * n), 7.0, device=device) for n in COLUMNS]
    grads = [frame[2:7, 1 : 2 * n : 2] for frame, n in zip(frames, COLUMNS, strict=True)]
    add(grads, torch.ones(3, 5, 24, device=device), batch.bases)
    for frame, grad in zip(frames, grads, strict=True):
        assert not bool((grad == 7.0).all())
        grad.fill_(7.0)
        assert bool((frame == 7.0).all())


def test_sums_over_a_vocabulary_are_cut_where_the_kernel_cuts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The planes of every stretch are added up, whatever else lies in the scratch memory."""
    problems = tuple(
        factor_products.describe_image(((8, n), (n, 1), BF16, 0), ((n, 16), (16, 1), BF16, 0), profile("sm_90"))
        for n in (1000, 40000, 128256)
    )
    assert [key.stretches for key, _ in problems] == [1, 2, 4]
    plan = factor_products.plan_images(profile("sm_90"), problems[2][0], (problems[2][1],) * 2)
    assert plan.view(torch.empty(2 * plan.planes_size), 2).shape == (2, 4, 3, plan.height, plan.width)


def profile(architecture: str) -> Profile:
    return Profile(architecture, 3, DESCRIPTORS[architecture])


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_factors_ask_for_no_kernels_of_their_own(architecture: str) -> None:
    """Wheels and self-tests know all of these."""
    listed = set(list_variants(architecture, DESCRIPTORS[architecture], rank_classes()))
    asked: set[Variant] = set()

    def note(variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        asked.add(variant)

    with planned_for(profile(architecture), note):
        for r, k in ((16, 128), (128, 128), (3, 30), (64, 256)):
            for dtype, basis in product((BF16, FP16, FP32), (BF16, FP32)):
                for mixed in (False, True):
                    batch = make(r, k, dtype, basis, torch.device("cpu"), mixed)
                    project(batch)
                    add([torch.zeros_like(factor) for factor in batch.factors], torch.ones(3, r, k), batch.bases)
    assert [variant.label() for variant in asked - listed] == []
    if architecture == "sm_90":
        assert {"hopper_project", "hopper_gradient"} <= {variant.kernel for variant in asked}


@pytest.mark.skipif(not NEWEST, reason=WHY_NEWEST)
@pytest.mark.parametrize(("dtype", "r", "k"), [(FP32, 16, 48), (BF16, 8, 136)], ids=str)
def test_factors_on_the_specialised_kernels(compiler: Compiler, dtype: torch.dtype, r: int, k: int) -> None:
    """Fewer rows than a tile has, in both orders, emulated; no byte that is read was left unwritten."""
    torch.use_deterministic_algorithms(False)
    batch = make(r, k, dtype, BF16, torch.device("cpu"), mixed=False)
    grads = [torch.randn_like(factor) for factor in batch.factors]
    before, coefficients = [grad.clone() for grad in grads], torch.randn(3, r, k)
    emulator = Emulator("sm_90", compiler)
    emulator.give(*batch.factors, *batch.bases, *grads, coefficients)
    with emulator:
        images = project(batch)
        add(grads, coefficients, batch.bases)
    assert all(stats.hazards == [] for _, stats in emulator.stats)
    assert {variant.kernel for variant, _ in emulator.stats} >= set(SPECIALISED) - {"hopper_pull"}
    check_images(batch, images)
    check_added(before, grads, coefficients, batch.bases)
