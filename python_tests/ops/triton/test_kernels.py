"""Every kernel against float64: interpreted on the CPU, compiled where there is a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from accuracy import check_drifts, check_pulled
from rpsft_kernels import ops
from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton import project_drift, pull_back, variants
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.tile_table import TileConfig
from support import (
    LAYOUTS,
    Form,
    Layout,
    Problem,
    exact_drift,
    laid_out,
    make_problem,
    operands_of,
    random_matrix,
    relative_error,
)

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Ten weights of different shapes and ranks in one launch: nothing divides a tile, both orientations, every tile class.
TEN = (
    (1, 1, 1),
    (5, 3, 1),
    (5, 3, 3),
    (33, 257, 1),
    (33, 257, 17),
    (200, 64, 3),
    (200, 64, 48),
    (576, 49, 17),
    (576, 49, 48),
    (140, 150, 130),
)
FEW = ((33, 257, 17), (200, 64, 48), (64, 96, 32), (5, 3, 2))


def problems_of(
    shapes: Sequence[tuple[int, int, int]],
    form: Form,
    dtype: torch.dtype,
    device: torch.device,
    basis: torch.dtype = torch.bfloat16,
    layout: Layout = "contiguous",
    drift: float = 0.05,
) -> list[Problem]:
    return [
        make_problem(form, (m, n), k, dtype, basis_dtype=basis, layout=layout, drift=drift, seed=i, device=device)
        for i, (m, n, k) in enumerate(shapes)
    ]


def project(problems: Sequence[Problem]) -> tuple[list[Tensor], Tensor]:
    return ops.project_drift(operands_of(problems), "triton")


@pytest.mark.parametrize("form", ["base", "block", "bare"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drifts_of_ten_weights_in_one_launch(form: Form, dtype: torch.dtype, device: torch.device) -> None:
    problems = problems_of(TEN, form, dtype, device)
    check_drifts(problems, *project(problems))


@pytest.mark.parametrize("form", ["base", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drifts_with_float32_bases(form: Form, dtype: torch.dtype, device: torch.device) -> None:
    problems = problems_of(FEW, form, dtype, device, basis=torch.float32)
    check_drifts(problems, *project(problems))


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_drifts_of_strided_weights(layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    problems = problems_of(FEW, "base", dtype, device, layout=layout)
    check_drifts(problems, *project(problems))


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_base_of_another_dtype_is_what_the_weight_holds_of_it(
    dtype: torch.dtype, base_dtype: torch.dtype, device: torch.device
) -> None:
    moved = [make_problem("base", (33, 40), 5, dtype, base_dtype=base_dtype, device=device)]
    check_drifts(moved, *project(moved))
    still = [make_problem("base", (33, 40), 5, dtype, base_dtype=base_dtype, drift=0.0, device=device)]
    drifts, squares = project(still)
    assert not drifts[0].any()
    assert not squares.any()


@pytest.mark.parametrize("basis", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", ["base", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exactly_zero_at_the_anchor(form: Form, dtype: torch.dtype, basis: torch.dtype, device: torch.device) -> None:
    problems = problems_of(FEW, "bare" if form == "block" else "base", dtype, device, basis=basis, drift=0.0)
    if form == "block":
        blocks, _ = project(problems)
        weights, lefts, rights, _, _ = operands_of(problems)
        drifts, squares = ops.project_drift(ops.Operands(weights, lefts, rights, [], blocks), "triton")
    else:
        drifts, squares = project(problems)
    _, lefts, rights, _, _ = operands_of(problems)
    assert not squares.any()
    assert not any(drift.any() for drift in drifts)
    grads = ops.pull_back(
        ops.Operands(lefts=lefts, rights=rights), drifts, 2 * torch.ones_like(squares), dtype, "triton"
    )
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_ten_weights_in_one_launch(dtype: torch.dtype, accumulate: bool, device: torch.device) -> None:
    check_gradients(TEN, dtype, torch.bfloat16, accumulate, "contiguous", device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_with_float32_bases(dtype: torch.dtype, device: torch.device) -> None:
    check_gradients(FEW, dtype, torch.float32, True, "contiguous", device)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "contiguous"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_into_strided_tensors(layout: Layout, dtype: torch.dtype, device: torch.device) -> None:
    check_gradients(FEW, dtype, torch.bfloat16, True, layout, device)


def check_gradients(
    shapes: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
    basis: torch.dtype,
    accumulate: bool,
    layout: Layout,
    device: torch.device,
) -> None:
    _, lefts, rights, _, _ = operands_of(problems_of(shapes, "bare", torch.float32, device, basis=basis))
    drifts = [random_matrix(k, k, seed=i, device=device) for i, (_, _, k) in enumerate(shapes)]
    before = [random_matrix(m, n, dtype, seed=7 + i, device=device) for i, (m, n, _) in enumerate(shapes)]
    grads = [laid_out(grad, layout) for grad in before]
    scales = torch.linspace(-2, 3, len(shapes), device=device)
    ops.pull_back_(grads, ops.Operands(lefts=lefts, rights=rights), drifts, scales, accumulate, "triton")
    for i, grad in enumerate(grads):
        check_pulled(grad, before[i] if accumulate else None, drifts[i], lefts[i], rights[i], float(scales[i]))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_full_anchors(dtype: torch.dtype, layout: Layout, device: torch.device) -> None:
    shapes = ((1, 1, 0), (5, 3, 0), (33, 257, 0), (64, 96, 0))
    problems = problems_of(shapes, "full", dtype, device, layout=layout)
    weights, _, _, pretrained, _ = operands_of(problems)
    drifts, squares = project(problems)
    scales = torch.linspace(0.5, 2.0, len(shapes), device=device)
    before = [random_matrix(m, n, dtype, seed=i, device=device) for i, (m, n, _) in enumerate(shapes)]
    grads = [laid_out(grad, layout) for grad in before]
    ops.pull_back_(grads, ops.Operands(weights, pretrained=pretrained), drifts, scales, True, "triton")
    for i, problem in enumerate(problems):
        moved = exact_drift(problem.weight, problem)
        assert drifts[i].shape == (0, 0)
        torch.testing.assert_close(squares[i].double(), moved.square().sum(), rtol=1e-5, atol=0.0)
        exact = float(scales[i]) * moved + before[i].double()
        assert relative_error(grads[i], exact) <= torch.finfo(dtype).eps
    still = problems_of(shapes, "full", dtype, device, layout=layout, drift=0.0)
    assert not project(still)[1].any()


def test_gradients_of_another_dtype_than_the_drift(device: torch.device) -> None:
    weights, _, _, pretrained, _ = operands_of(problems_of(((33, 40, 0),), "full", torch.bfloat16, device))
    grads = [torch.zeros(33, 40, device=device)]
    ops.pull_back_(
        grads,
        ops.Operands(weights, pretrained=pretrained),
        [torch.empty(0, 0)],
        torch.ones(1, device=device),
        True,
        "triton",
    )
    assert relative_error(grads[0], weights[0].double() - pretrained[0].double()) <= 1e-6


@pytest.fixture(params=[False, True], ids=["pointers", "descriptors"])
def aligned_profile(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> bool:
    """On the CPU: an architecture that reads aligned operands by pointers, or by tensor descriptors."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_device, "device_profile", lambda _: Profile("interpreter", 3, request.param))
    return bool(request.param)


@pytest.mark.parametrize("form", ["base", "block"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "padded"])
@pytest.mark.usefixtures("aligned_profile")
def test_aligned_operands_take_the_vector_and_descriptor_paths(
    form: Form, layout: Layout, device: torch.device
) -> None:
    even = ((64, 128, 64), (128, 64, 64), (64, 64, 64))
    ragged = ((72, 136, 40), (136, 72, 40), (40, 24, 8))
    for shapes in (even, ragged):
        problems = problems_of(shapes, form, torch.bfloat16, device, layout=layout)
        check_drifts(problems, *project(problems))
        check_gradients(shapes, torch.bfloat16, torch.bfloat16, True, layout, device)


@pytest.mark.usefixtures("any_tiles")
@pytest.mark.parametrize("coarse", [("drift", "gradient"), ("project", "pull")])
def test_phases_with_different_tiles_leave_no_gaps(
    coarse: tuple[str, str], monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    """One phase writes all of T and P that the next one reads, whatever the tables say."""
    shipped = variants.tile_config

    def mix_tiles(architecture: str, phase: str, rank: int, operands: str, narrow: bool = False) -> TileConfig:
        edge = 64 if phase in coarse else 32
        return replace(shipped(architecture, phase, rank, operands), block_m=edge, block_n=edge, block_k=edge)

    monkeypatch.setattr(variants, "tile_config", mix_tiles)
    for plan in (project_drift.plan_forward, pull_back.plan_backward):
        plan.cache_clear()
    shapes = ((20, 70, 16), (70, 20, 5), (40, 33, 32), (33, 130, 33))
    for form in ("base", "block"):
        problems = problems_of(shapes, form, torch.bfloat16, device)
        check_drifts(problems, *project(problems))
    check_gradients(shapes, torch.bfloat16, torch.bfloat16, True, "contiguous", device)
    check_gradients(shapes, torch.float32, torch.bfloat16, False, "transposed", device)
    for plan in (project_drift.plan_forward, pull_back.plan_backward):
        plan.cache_clear()


def test_split_sums(device: torch.device) -> None:
    shapes = ((520, 600, 16), (600, 530, 5), (64, 530, 16))
    for form in ("base", "block"):
        problems = problems_of(shapes, form, torch.bfloat16, device)
        check_drifts(problems, *project(problems))


def test_empty_weights_and_groups(device: torch.device) -> None:
    problems = problems_of(((5, 3, 2), (4, 6, 3)), "base", torch.float32, device)
    weights, lefts, rights, pretrained, _ = operands_of(problems)
    for lost in ((0, 3, 2), (5, 0, 2)):
        m, n, k = lost
        empty = [torch.empty(m, n, device=device), *weights]
        us = [torch.ones(m, k, dtype=torch.bfloat16, device=device), *lefts]
        vs = [torch.ones(n, k, dtype=torch.bfloat16, device=device), *rights]
        drifts, squares = ops.project_drift(ops.Operands(empty, us, vs, [empty[0], *pretrained]), "triton")
        assert not drifts[0].any()
        assert squares[0] == 0
        check_drifts(problems, drifts[1:], squares[1:])
        grads = ops.pull_back(
            ops.Operands(lefts=us, rights=vs), drifts, torch.ones_like(squares), torch.float32, "triton"
        )
        assert grads[0].shape == (m, n)
        assert all(grad.isfinite().all() for grad in grads)


def test_the_same_bits_again_alone_and_in_any_company(device: torch.device) -> None:
    problems = problems_of(FEW + ((520, 600, 16),), "base", torch.bfloat16, device)
    together, squares = project(problems)
    again, squares_again = project(problems)
    backwards, _ = project(problems[::-1])
    assert torch.equal(squares, squares_again)
    for i, problem in enumerate(problems):
        alone, _ = project([problem])
        for other in (again[i], backwards[-1 - i], alone[0]):
            assert torch.equal(together[i], other)


def test_inputs_are_not_written(device: torch.device) -> None:
    problems = problems_of(FEW, "block", torch.float32, device)
    pieces = operands_of(problems)
    copies = [[piece.clone() for piece in kind] for kind in pieces]
    project(problems)
    for kind, copy in zip(pieces, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(kind, copy, strict=True))


def test_blocks_and_drifts_may_lie_anywhere(device: torch.device) -> None:
    """At any address, they give the bits that they give at a multiple of 16 bytes."""

    def misalign(matrix: Tensor) -> Tensor:
        copy = torch.empty(matrix.numel() + 1, device=device)[1:].view(matrix.shape).copy_(matrix)
        assert copy.data_ptr() % 16 != 0
        return copy

    weights, lefts, rights, _, blocks = operands_of(
        problems_of(((33, 257, 16), (200, 64, 48)), "block", HALF[0], device)
    )
    drifts, squares = ops.project_drift(ops.Operands(weights, lefts, rights, [], blocks), "triton")
    others, _ = ops.project_drift(
        ops.Operands(weights, lefts, rights, [], [misalign(block) for block in blocks]), "triton"
    )
    grads = ops.pull_back(ops.Operands(lefts=lefts, rights=rights), drifts, squares, HALF[0], "triton")
    pulled = ops.pull_back(
        ops.Operands(lefts=lefts, rights=rights), [misalign(drift) for drift in drifts], squares, HALF[0], "triton"
    )
    for one, other in zip(drifts + grads, others + pulled, strict=True):
        assert torch.equal(one, other)
