"""The ``torch`` backend with float32 and float64 products: its errors, layouts, dtypes and exact zeros."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rpsft_kernels import ops
from rpsft_kernels.ops import products
from rpsft_kernels.ops.products import Machine
from support import (
    DTYPES,
    FORMS,
    LAYOUTS,
    Form,
    Layout,
    Problem,
    accumulation,
    exact_drift,
    exact_moved,
    exact_pull,
    laid_out,
    make_problem,
    operands_of,
    orthonormal,
    random_matrix,
)

CASES = [
    *((1, 1, 1), (5, 3, 1), (5, 3, 3)),
    *((33, 257, 1), (33, 257, 3), (33, 257, 17)),
    *((200, 64, 1), (200, 64, 3), (200, 64, 17), (200, 64, 48)),
    *((576, 49, 1), (576, 49, 3), (576, 49, 17), (576, 49, 48)),
    (144, 160, 130),
]
SCALES = (0.7, -3.0)


@pytest.fixture(autouse=True)
def _float32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply in float32 on every device, as these bounds need; ``test_products`` tests products of bfloat16."""
    monkeypatch.setattr(
        products, "machine", lambda device: Machine("float32", None if device.type == "cpu" else 1 << 20)
    )


def drift_bound(problem: Problem) -> Tensor:
    """Return one unit in the last place of the largest value that the sum of each element of C may reach."""
    moved = exact_moved(problem.weight, problem.base).abs()
    if problem.left is not None and problem.right is not None:
        moved = problem.left.double().abs().T @ moved @ problem.right.double().abs()
    if problem.block is not None:
        moved = moved + problem.block.double().abs()
    return torch.finfo(accumulation(problem.weight.dtype)).eps * moved


def check_gradient(grad: Tensor, exact: Tensor, magnitude: Tensor, sums: torch.dtype) -> None:
    """Check a gradient: ``exact`` rounded once to its dtype, after sums of ``magnitude`` in dtype ``sums``."""
    target = torch.finfo(grad.dtype)
    rounding = exact.abs() * target.eps / 2 + target.smallest_normal * target.eps
    # Products with C, with the scale and with V are each rounded by half a unit, and their sums by little more.
    # In float64 the expectation is rounded as often.
    roundings = 2 if sums == torch.float32 else 4
    bound = rounding + roundings * torch.finfo(sums).eps * magnitude
    assert bool(((grad.double() - exact).abs() <= bound).all())


def pull_exactly(problem: Problem, drift: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient in float64 for a scale of 1, and the same sums of absolute values."""
    if problem.left is None or problem.right is None:
        moved = exact_moved(problem.weight, problem.base)
        return moved, moved.abs()
    exact = exact_pull(drift, problem.left, problem.right)
    return exact, exact_pull(drift.abs(), problem.left.abs(), problem.right.abs())


def make_scales(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=accumulation(dtype), device=device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "rank"), CASES)
def test_drift(m: int, n: int, rank: int, form: Form, dtype: torch.dtype, device: torch.device) -> None:
    for basis_dtype in (torch.bfloat16, torch.float32, *((torch.float64,) if dtype == torch.float64 else ())):
        problems = [
            make_problem(form, (m, n), rank, dtype, basis_dtype=basis_dtype, seed=seed, device=device)
            for seed in (1, 5)
        ]
        drifts, squares = ops.project_drift(operands_of(problems), "torch")
        assert squares.dtype == accumulation(dtype) and squares.shape == (2,)
        for problem, drift, square in zip(problems, drifts, squares, strict=True):
            exact, bound = exact_drift(problem.weight, problem), drift_bound(problem)
            assert drift.dtype == accumulation(dtype)
            if form == "full":
                assert drift.shape == (0, 0)
            else:
                assert drift.shape == (rank, rank)
                assert bool(((drift.double() - exact).abs() <= bound).all())
            spread = 2 * float((exact.abs() * bound).sum()) + float(bound.square().sum())
            eps = torch.finfo(square.dtype).eps
            assert abs(float(square) - float(exact.square().sum())) <= spread + 4 * eps * float(exact.square().sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["base", "full"])
@pytest.mark.parametrize(("m", "n", "rank"), CASES)
def test_gradient(m: int, n: int, rank: int, form: Form, dtype: torch.dtype, device: torch.device) -> None:
    problems = [make_problem(form, (m, n), rank, dtype, seed=seed, device=device) for seed in (1, 5)]
    operands = operands_of(problems).for_pull_back()
    size = 0 if operands.full else rank
    drifts = [random_matrix(size, size, accumulation(dtype), seed=seed, device=device) for seed in (7, 8)]
    scales = make_scales(SCALES, dtype, device)
    for grad_dtype in DTYPES:
        grads = ops.pull_back(operands, drifts, scales, grad_dtype, "torch")
        for problem, drift, scale, grad in zip(problems, drifts, scales.tolist(), grads, strict=True):
            assert grad.dtype == grad_dtype and grad.is_contiguous()
            exact, magnitude = pull_exactly(problem, drift)
            check_gradient(grad, scale * exact, abs(scale) * magnitude, accumulation(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "rank"), [(33, 257, 17), (200, 64, 3), (576, 49, 48)])
def test_drift_of_strided_weights(m: int, n: int, rank: int, form: Form, layout: Layout, device: torch.device) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        plain = make_problem(form, (m, n), rank, dtype, device=device)
        strided = make_problem(form, (m, n), rank, dtype, layout=layout, device=device)
        assert torch.equal(strided.weight, plain.weight)
        drifts, squares = ops.project_drift(operands_of([strided]), "torch")
        expected, expected_squares = ops.project_drift(operands_of([plain]), "torch")
        # A block must cancel wherever the weight lies, which takes the same bits.
        assert torch.equal(drifts[0], expected[0]) and torch.equal(squares, expected_squares)
        assert bool(squares.isfinite().all()) and bool(squares.all())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["base", "full"])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulates_into_gradients_of_any_layout_and_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, form: Form, layout: Layout, device: torch.device
) -> None:
    for m, n, rank in ((5, 3, 3), (33, 257, 17), (200, 64, 3)):
        problem = make_problem(form, (m, n), rank, dtype, layout=layout, device=device)
        operands = operands_of([problem]).for_pull_back()
        size = 0 if operands.full else rank
        drift = random_matrix(size, size, accumulation(dtype), seed=7, device=device)
        scales = make_scales(SCALES[:1], dtype, device)
        exact, magnitude = pull_exactly(problem, drift)
        exact, magnitude = scales.item() * exact, abs(scales.item()) * magnitude
        existing = random_matrix(m, n, grad_dtype, scale=3.0, seed=9, device=device)

        added = laid_out(existing, layout)
        ops.pull_back_([added], operands, [drift], scales, True, "torch")
        total = existing.double() + exact
        check_gradient(added, total, existing.double().abs() + magnitude, accumulation(dtype))

        written = laid_out(torch.full_like(existing, float("nan")), layout)
        ops.pull_back_([written], operands, [drift], scales, False, "torch")
        check_gradient(written, exact, magnitude, accumulation(dtype))


@pytest.mark.parametrize("layout", ["padded", "sliced"])
def test_writes_nothing_beside_a_strided_gradient(layout: Layout, device: torch.device) -> None:
    problem = make_problem("base", (33, 20), 3, device=device)
    _, lefts, rights, _, _ = operands_of([problem])
    drift, scales = random_matrix(3, 3, device=device), make_scales((1.0,), torch.float32, device)
    for accumulate in (True, False):
        grad = laid_out(torch.zeros(33, 20, device=device), layout)
        frame = torch.as_strided(grad, (33 * grad.stride(0),), (1,))
        around = int(frame.isnan().sum())
        assert around == frame.numel() - 33 * 20
        ops.pull_back_([grad], ops.Operands(lefts=lefts, rights=rights), [drift], scales, accumulate, "torch")
        assert bool(grad.isfinite().all()) and int(frame.isnan().sum()) == around


def test_every_weight_has_its_own_scale(device: torch.device) -> None:
    problems = [make_problem("bare", (20 + seed, 30), 4, seed=seed, device=device) for seed in range(3)]
    _, lefts, rights, _, _ = operands_of(problems)
    drifts = [random_matrix(4, 4, seed=seed, device=device) for seed in range(3)]
    values = (0.0, 1.0, -2.5)
    scales = torch.tensor(values, device=device)
    grads = ops.pull_back(ops.Operands(lefts=lefts, rights=rights), drifts, scales, torch.float32, "torch")
    assert not grads[0].any()
    for left, right, drift, value, grad in zip(lefts, rights, drifts, values, grads, strict=True):
        exact = exact_pull(drift, left, right, value)
        check_gradient(grad, exact, exact_pull(drift.abs(), left.abs(), right.abs(), abs(value)), torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["base", "full"])
@pytest.mark.parametrize("shape", [(5, 3), (33, 257), (200, 64)])
def test_exactly_zero_at_the_base(
    shape: tuple[int, int], form: Form, dtype: torch.dtype, layout: Layout, device: torch.device
) -> None:
    # The base may be wider or narrower than the weight, which is the base as a model of its own dtype holds it.
    for base_dtype in DTYPES:
        problem = make_problem(form, shape, 3, dtype, base_dtype=base_dtype, drift=0.0, layout=layout, device=device)
        assert bool(problem.weight.any())
        drifts, squares = ops.project_drift(operands_of([problem]), "torch")
        assert not drifts[0].any() and not squares.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n", "rank"), [(5, 3, 3), (33, 257, 17), (200, 64, 48), (576, 49, 1)])
def test_exactly_zero_with_a_block_of_the_same_arithmetic(
    m: int, n: int, rank: int, dtype: torch.dtype, layout: Layout, device: torch.device
) -> None:
    for basis_dtype in (torch.bfloat16, torch.float32):
        bare = make_problem("bare", (m, n), rank, dtype, basis_dtype=basis_dtype, device=device)
        weights, lefts, rights, _, _ = operands_of([bare])
        blocks, sizes = ops.project_drift(ops.Operands(weights, lefts, rights), "torch")
        assert bool(sizes.all())
        moved = [laid_out(weights[0], layout)]
        drifts, squares = ops.project_drift(ops.Operands(moved, lefts, rights, [], blocks), "torch")
        assert not drifts[0].any() and not squares.any()


@pytest.mark.parametrize("form", ["base", "full"])
def test_a_base_of_another_dtype_is_read_as_the_weight_holds_it(form: Form, device: torch.device) -> None:
    # After a step of a bfloat16 weight with a float32 base, C is that of the step and not of the cast.
    problem = make_problem(form, (40, 24), 4, torch.bfloat16, base_dtype=torch.float32, drift=1e-2, device=device)
    assert problem.base is not None and problem.base.dtype == torch.float32
    _, squares = ops.project_drift(operands_of([problem]), "torch")
    exact = float(exact_drift(problem.weight, problem).square().sum())
    unrounded = problem.weight.double() - problem.base.double()
    if problem.left is not None and problem.right is not None:
        unrounded = problem.left.double().T @ unrounded @ problem.right.double()
    assert abs(float(squares[0]) - exact) <= 1e-5 * exact
    assert abs(float(squares[0]) - float(unrounded.square().sum())) > 1e-2 * exact


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (0, 7), (7, 0)])
def test_degenerate_shapes(shape: tuple[int, int], device: torch.device) -> None:
    weight = random_matrix(*shape, device=device)
    left, right = (torch.ones(size, 1, device=device) for size in shape)
    drifts, squares = ops.project_drift(ops.Operands([weight], [left], [right]), "torch")
    total = float(weight.double().sum())
    assert abs(float(drifts[0]) - total) <= 1e-5 * float(weight.abs().sum())
    assert abs(float(squares[0]) - total**2) <= 2e-5 * max(total**2, float(weight.abs().sum()) * abs(total))
    scales = torch.ones(1, device=device)
    drift = torch.full((1, 1), 2.0, device=device)
    grads = ops.pull_back(ops.Operands(lefts=[left], rights=[right]), [drift], scales, torch.float32, "torch")
    assert torch.equal(grads[0], torch.full(shape, 2.0, device=device))


def test_no_rank_no_drift(device: torch.device) -> None:
    weight, left, right = (torch.ones(shape, device=device) for shape in ((4, 5), (4, 0), (5, 0)))
    drifts, squares = ops.project_drift(ops.Operands([weight], [left], [right]), "torch")
    assert drifts[0].shape == (0, 0) and squares.tolist() == [0.0]
    grads = ops.pull_back(ops.Operands(lefts=[left], rights=[right]), drifts, squares, torch.float32, "torch")
    assert torch.equal(grads[0], torch.zeros(4, 5, device=device))


def test_same_inputs_same_bits(device: torch.device) -> None:
    problem = make_problem("base", (200, 64), 17, torch.bfloat16, device=device)
    runs = [ops.project_drift(operands_of([problem]), "torch") for _ in range(3)]
    assert all(torch.equal(run[0][0], runs[0][0][0]) and torch.equal(run[1], runs[0][1]) for run in runs)
    basis = orthonormal(200, 17, device=device)
    pulled = [
        ops.pull_back(ops.Operands(lefts=[basis], rights=[basis]), runs[0][0], runs[0][1], torch.bfloat16, "torch")
        for _ in range(3)
    ]
    assert all(torch.equal(grads[0], pulled[0][0]) for grads in pulled)
