"""The ``torch`` backend on machines that multiply bfloat16: imitated on the CPU, and on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from memory_trace import trace
from rpsft_kernels import ops
from rpsft_kernels.ops import products, reference
from rpsft_kernels.ops.products import Machine, Parts, Plain
from support import (
    DTYPES,
    FORMS,
    LAYOUTS,
    Form,
    Layout,
    accumulation,
    exact_drift,
    exact_gradient,
    exact_moved,
    exact_pull,
    laid_out,
    make_problem,
    operands_of,
    random_matrix,
    relative_error,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
# The shapes below have several blocks of this size.
BLOCK_BYTES = 24 << 10
SHAPES = [(1, 1, 1), (5, 3, 3), (33, 257, 17), (200, 64, 48), (257, 200, 33), (144, 400, 130)]
HALVES = [torch.bfloat16, torch.float16]
# W - W0, T, C and P are rounded to bfloat16, by up to 2^-9 each.
ROUNDED = 4 * 2**-9


# Where there is a GPU, it is tested as it is too.
MACHINES = ["mixed", "bfloat16", *(["gpu"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> Machine:
    """A machine that multiplies bfloat16: imitated on the CPU, or the GPU as it is."""
    if request.param == "gpu":
        gpu = products.machine(device)
        if gpu.units == "float32":
            pytest.skip("this GPU multiplies bfloat16 no faster than float32")
        return gpu
    imitated = Machine(request.param, BLOCK_BYTES)
    monkeypatch.setattr(products, "machine", lambda _: imitated)
    multiply = torch.mm

    def mm(first: Tensor, second: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert first.dtype == second.dtype == torch.bfloat16 and out_dtype == torch.float32
        return multiply(first.float(), second.float())

    monkeypatch.setattr(torch, "mm", mm)
    return imitated


@pytest.fixture
def where(machine: Machine, device: torch.device, request: pytest.FixtureRequest) -> torch.device:
    return device if request.node.callspec.params["machine"] == "gpu" else CPU


def pull_one(problem: Any, drift: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    operands = operands_of([problem]).for_pull_back()
    scales = torch.tensor([scale], dtype=drift.dtype, device=drift.device)
    (grad,) = ops.pull_back(operands, [drift], scales, dtype, "torch")
    return grad


# -- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "n", "rank"), SHAPES)
def test_drift(
    m: int, n: int, rank: int, form: Form, dtype: torch.dtype, basis_dtype: torch.dtype, where: torch.device
) -> None:
    problem = make_problem(form, (m, n), rank, dtype, basis_dtype=basis_dtype, device=where)
    drifts, squares = ops.project_drift(operands_of([problem]), "torch")
    exact = exact_drift(problem.weight, problem)
    assert drifts[0].dtype == squares.dtype == accumulation(dtype)
    rounds = form == "base" and basis_dtype == torch.bfloat16 and dtype != torch.float64
    # Only float32 sums of terms as large as W's are off: the difference that the block form leaves is not lost.
    moved = exact_moved(problem.weight, problem.base).abs()
    if problem.left is not None and problem.right is not None:
        moved = problem.left.double().abs().T @ moved @ problem.right.double().abs()
        error = (drifts[0].double() - exact).abs()
        if rounds:
            assert relative_error(drifts[0], exact) < ROUNDED
        else:
            assert bool((error <= 2 * torch.finfo(accumulation(dtype)).eps * moved).all())
    bound = 2 * ROUNDED if rounds else 1e-4 if form == "block" else 1e-5
    assert float(squares[0]) == pytest.approx(float(exact.square().sum()), rel=bound)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("base_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["base", "full"])
def test_exactly_zero_at_the_base(
    form: Form, dtype: torch.dtype, base_dtype: torch.dtype, layout: Layout, where: torch.device
) -> None:
    for shape in ((33, 257), (200, 64)):
        problem = make_problem(form, shape, 3, dtype, base_dtype=base_dtype, drift=0.0, layout=layout, device=where)
        drifts, squares = ops.project_drift(operands_of([problem]), "torch")
        assert not drifts[0].any() and not squares.any() and bool(problem.weight.any())
        grad = pull_one(problem, drifts[0], 0.7, dtype)
        assert not grad.any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_zero_with_a_block_of_the_same_arithmetic(
    dtype: torch.dtype, basis_dtype: torch.dtype, layout: Layout, where: torch.device
) -> None:
    for m, n, rank in ((5, 3, 3), (33, 257, 17), (200, 64, 48)):
        bare = make_problem("bare", (m, n), rank, dtype, basis_dtype=basis_dtype, device=where)
        weights, lefts, rights, _, _ = operands_of([bare])
        blocks, sizes = ops.project_drift(ops.Operands(weights, lefts, rights), "torch")
        drifts, squares = ops.project_drift(
            ops.Operands([laid_out(weights[0], layout)], lefts, rights, [], blocks), "torch"
        )
        assert bool(sizes.all()) and not drifts[0].any() and not squares.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_drift_is_rounded_once(dtype: torch.dtype, where: torch.device) -> None:
    """The weight is not rounded before, and the difference not by way of another narrow dtype."""
    weight = random_matrix(40, 70, dtype, device=where)
    for base_dtype in (torch.bfloat16, torch.float16, torch.float32):
        base = (weight.double() * (1 + 1e-2 * random_matrix(40, 70, torch.float64, seed=3, device=where))).to(
            base_dtype
        )
        rounded = reference._subtract_rows_rounded(weight, base, slice(3, 37))
        exact = exact_moved(weight, base)[3:37]
        assert torch.equal(rounded, exact.float().bfloat16()) and bool(rounded.any()) and rounded.is_contiguous()


@pytest.mark.parametrize("relative", [1e-5, 1e-3])
@pytest.mark.parametrize(("m", "n", "rank"), [(257, 200, 33), (144, 400, 130)])
def test_the_first_steps_drift_of_float32_weights(
    m: int, n: int, rank: int, relative: float, where: torch.device
) -> None:
    """The numeric contract of the base form: a relative error of 0.01 from the very first step."""
    problem = make_problem("base", (m, n), rank, base_dtype=torch.bfloat16, drift=relative, device=where)
    (drift,), _ = ops.project_drift(operands_of([problem]), "torch")
    assert relative_error(pull_one(problem, drift, 2.0, torch.float32), exact_gradient(problem.weight, problem)) < 0.01


# -- gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["base", "full"])
def test_gradient(
    form: Form, dtype: torch.dtype, grad_dtype: torch.dtype, basis_dtype: torch.dtype, where: torch.device
) -> None:
    for m, n, rank in SHAPES:
        problem = make_problem(form, (m, n), rank, dtype, basis_dtype=basis_dtype, device=where)
        size = 0 if form == "full" else rank
        drift = random_matrix(size, size, accumulation(dtype), seed=7, device=where)
        grad = pull_one(problem, drift, -3.0, grad_dtype)
        assert grad.dtype == grad_dtype and grad.is_contiguous()
        if problem.left is None or problem.right is None:
            exact = -3.0 * exact_moved(problem.weight, problem.base)
        else:
            exact = exact_pull(drift, problem.left, problem.right, -3.0)
        rounds = form == "base" and basis_dtype == torch.bfloat16 and dtype != torch.float64
        bound = ROUNDED if rounds else 2e-6
        assert relative_error(grad, exact) < bound + torch.finfo(grad_dtype).eps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("accumulate", [True, False])
def test_gradients_of_any_layout(
    accumulate: bool, basis_dtype: torch.dtype, grad_dtype: torch.dtype, layout: Layout, where: torch.device
) -> None:
    for m, n, rank in ((5, 3, 3), (33, 257, 17), (200, 64, 48)):
        problem = make_problem("bare", (m, n), rank, basis_dtype=basis_dtype, device=where)
        assert problem.left is not None and problem.right is not None
        drift = random_matrix(rank, rank, seed=7, device=where)
        before = random_matrix(m, n, grad_dtype, scale=3.0, seed=9, device=where)
        grad = laid_out(before if accumulate else torch.full_like(before, float("nan")), layout)
        frame = torch.as_strided(grad, (m * grad.stride(0),), (1,)) if layout in ("padded", "sliced") else None
        around = 0 if frame is None else int(frame.isnan().sum())
        scales = torch.tensor([0.7])
        ops.pull_back_(
            [grad], ops.Operands(lefts=[problem.left], rights=[problem.right]), [drift], scales, accumulate, "torch"
        )
        exact = exact_pull(drift, problem.left, problem.right, 0.7)
        total = exact + before.double() if accumulate else exact
        bound = (ROUNDED if basis_dtype == torch.bfloat16 else 2e-6) * float(exact.norm())
        assert float((grad.double() - total).norm()) < bound + torch.finfo(grad_dtype).eps * float(total.norm())
        # A frame that began as NaN is NaN still, and nothing else is.
        assert frame is None or int(frame.isnan().sum()) == around - (0 if accumulate else m * n)


def test_same_inputs_same_bits(where: torch.device) -> None:
    problem = make_problem("base", (200, 300), 17, torch.bfloat16, device=where)
    runs = []
    for _ in range(3):
        (drift,), squares = ops.project_drift(operands_of([problem]), "torch")
        runs.append((drift, squares, pull_one(problem, drift, 0.3, torch.bfloat16)))
    assert all(torch.equal(a, b) for run in runs for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(1, 300), (300, 1), (0, 7), (7, 0)])
def test_degenerate_shapes(shape: tuple[int, int], where: torch.device) -> None:
    for rank, with_base in ((1, True), (1, False), (0, True)):
        weight = random_matrix(*shape, torch.bfloat16, device=where)
        left, right = (torch.ones(size, rank, dtype=torch.bfloat16, device=where) for size in shape)
        pretrained = [torch.zeros_like(weight)] if with_base else []
        drifts, squares = ops.project_drift(ops.Operands([weight], [left], [right], pretrained), "torch")
        total = float(weight.double().sum()) if rank else 0.0
        assert drifts[0].shape == (rank, rank) and float(drifts[0].sum()) == pytest.approx(total, rel=0.01, abs=0.05)
        assert float(squares[0]) == pytest.approx(total**2, rel=0.02, abs=0.05)
        drift = torch.full((rank, rank), 2.0, device=where)
        for dtype in (torch.bfloat16, torch.float32):
            (grad,) = ops.pull_back(ops.Operands(lefts=[left], rights=[right]), [drift], torch.ones(1), dtype, "torch")
            assert torch.equal(grad, torch.full(shape, 2.0 * rank, dtype=dtype, device=where))


# -- parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parts_make_up_the_number(dtype: torch.dtype) -> None:
    multiplier = Parts("mixed", rounds=False)
    values = random_matrix(50, 60, torch.float64).mul_(10.0 ** torch.arange(-4, 2).repeat(10)).to(dtype)
    parts = multiplier.operand(values)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    error = (sum(part.double() for part in parts) - values.double()).abs()
    assert bool((error <= (2.0**-24 if dtype == torch.float32 else 0) * values.double().abs()).all())
    for part, other in zip(parts, Parts("bfloat16", rounds=False).operand(values), strict=True):
        assert other.dtype == torch.float32 and torch.equal(part.float(), other)
    assert torch.equal(Parts("bfloat16", rounds=True).operand(values)[0], values.bfloat16())


def test_tf32_has_nothing_to_round() -> None:
    """Each operand of a product is a bfloat16 number, of which TF32 keeps all."""
    multiplier = Parts("bfloat16", rounds=False)
    multiplied: list[Tensor] = []

    class Watched(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
                multiplied.extend(arg.as_subclass(Tensor) for arg in args)
            return super().__torch_function__(func, types, args, kwargs or {})

    first, second = (random_matrix(9, 9, seed=i).as_subclass(Watched) for i in (1, 2))
    product = multiplier.multiply(multiplier.operand(first), multiplier.operand(second))
    assert len(multiplied) == 12 and all(torch.equal(part, part.bfloat16().float()) for part in multiplied)
    assert relative_error(product.as_subclass(Tensor), first.double() @ second.double()) < 1e-6


# -- blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 15, 16, 100, 129, 1000])
@pytest.mark.parametrize("row_bytes", [0, 1, 10, 300, 5000])
@pytest.mark.parametrize("fixed_bytes", [0, 5000, 1 << 20])
def test_blocks_cover_all_rows_within_the_bound(rows: int, row_bytes: int, fixed_bytes: int) -> None:
    limit = 20000
    blocks = list(Machine("mixed", limit).row_blocks((rows, 7), row_bytes, fixed_bytes))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))
    longest = max(block.stop - block.start for block in blocks)
    assert longest <= 16 or longest * row_bytes + min(fixed_bytes, limit * 3 // 4) <= limit
    if row_bytes == 0:
        assert len(blocks) == 1
    assert list(Machine("mixed", limit).row_blocks((0, 7), row_bytes)) == []


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ["base", "bare", "full"])
@pytest.mark.parametrize("units", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(600, 800), (800, 600)])
def test_temporaries_are_bounded(
    shape: tuple[int, int],
    units: Any,
    form: Form,
    dtype: torch.dtype,
    basis_dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limit = 400 << 10
    monkeypatch.setattr(products, "machine", lambda _: Machine(units, limit))
    subtract = torch.sub

    def subtract_by_rows(first: Tensor, second: Tensor, out: Tensor) -> Tensor:
        # The CPU would convert the whole result before it is written; a GPU converts number by number.
        for row in range(len(out)):
            subtract(first[row], second[row], out=out[row])
        return out

    monkeypatch.setattr(torch, "sub", subtract_by_rows)
    problem = make_problem(form, shape, 8, dtype, basis_dtype=basis_dtype)
    operands = operands_of([problem])._replace(blocks=[])
    projection = trace(lambda: ops.project_drift(operands, "torch"))
    drift = random_matrix(0 if operands.full else 8, 0 if operands.full else 8)
    # The memory that products of the CPU's library need is not counted: a GPU does not need it.
    slack = 160 << 10
    assert 0 < projection.peak <= limit + slack
    for grad_dtype in (torch.bfloat16, torch.float32):
        for layout in ("contiguous", "sliced"):
            grad = laid_out(torch.zeros(shape, dtype=grad_dtype), layout)
            read = operands.for_pull_back()
            pull_back = trace(lambda g=grad, o=read: ops.pull_back_([g], o, [drift], torch.ones(1), True, "torch"))
            assert pull_back.peak <= limit + slack


# -- machines ----------------------------------------------------------------------------------------------


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The abilities of a made-up GPU, which a test may change."""
    abilities = {"capability": (9, 0), "into float32": True}
    products.machine.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: abilities["capability"])
    monkeypatch.setattr(products, "_multiplies_into_float32", lambda _: abilities["into float32"])
    yield abilities
    products.machine.cache_clear()


@pytest.mark.parametrize(
    ("capability", "into_float32", "hip", "units"),
    [
        ((9, 0), True, None, "mixed"),
        ((8, 0), False, None, "bfloat16"),
        ((7, 5), True, None, "float32"),
        ((9, 4), False, "6.4", "bfloat16"),
        ((9, 4), True, "7.0", "mixed"),
    ],
)
def test_units_of_gpus(
    capability: tuple[int, int],
    into_float32: bool,
    hip: str | None,
    units: str,
    made_up_gpu: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made_up_gpu |= {"capability": capability, "into float32": into_float32}
    monkeypatch.setattr(torch.version, "hip", hip)
    assert products.machine(GPU) == Machine(units, 256 << 20)  # type: ignore[arg-type]
    dotted = ".".join(map(str, capability))
    assert ops.arithmetic_id("torch", GPU, torch.bfloat16) == f"torch:cuda-{dotted}-{units}:bfloat16"


def test_other_devices() -> None:
    assert products.machine(CPU) == Machine("float32", None)
    assert ops.arithmetic_id("torch", CPU, torch.float32) == "torch:cpu:float32"
    assert products.machine(torch.device("mps")) == Machine("float32", 256 << 20)


def test_float64_is_multiplied_as_it_is() -> None:
    assert isinstance(products.choose_multiplier(Machine("mixed", 1), torch.float64, True), Plain)
    assert isinstance(products.choose_multiplier(Machine("float32", 1), torch.float32, True), Plain)


def test_a_torch_that_cannot_multiply_into_float32_is_asked_once() -> None:
    # The CPU of every torch raises, as an older torch does on a GPU.
    assert products._multiplies_into_float32(CPU) is False


@pytest.mark.parametrize("has", [True, False])
def test_devices_without_float64(has: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = type("Properties", (), {"has_fp64": has})
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: facts)
    found = {name: products.has_float64.__wrapped__(torch.device(name)) for name in ("cpu", "cuda", "mps", "xpu")}
    assert found == {"cpu": True, "cuda": True, "mps": False, "xpu": has}
