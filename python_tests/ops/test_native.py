"""The compiled CPU engine through its backend. The C++ tests (csrc/tests) take shapes and strides at random."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from rpsft_kernels import ops
from rpsft_kernels.ops import native, native_check
from support import (
    FORMS,
    LAYOUTS,
    Form,
    Layout,
    exact_drift,
    exact_gradient,
    exact_penalty,
    exact_pull,
    laid_out,
    make_problem,
    operands_of,
    orthonormal,
    random_matrix,
    relative_error,
)

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [(5, 3, 1), (33, 257, 17), (200, 64, 48), (576, 49, 48), (144, 160, 130), (300, 700, 40)]


@pytest.fixture(params=["amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this processor; the engine itself must be built."""
    assert "portable" in native.instruction_sets()
    if request.param not in native.instruction_sets():
        pytest.skip(f"{request.param}: {native.missing_instruction_sets()[request.param]}")
    monkeypatch.setenv("RPSFT_ISA", request.param)
    assert native.instruction_set() == request.param
    return str(request.param)


def tolerance(instruction_set: str, basis_dtype: torch.dtype, form: Form) -> float:
    """Return the relative error that rounding may cause: of operands to bfloat16, 2^-9 each, or of float32 sums."""
    rounds = instruction_set in ("amx_bf16", "avx512_bf16") and basis_dtype == torch.bfloat16 and form == "base"
    return 2**-8 if rounds else 2e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_drift(form: Form, dtype: torch.dtype, layout: Layout, instruction_set: str) -> None:
    for m, n, rank in SHAPES:
        for basis_dtype in (torch.bfloat16, torch.float32):
            problem = make_problem(form, (m, n), rank, dtype, basis_dtype=basis_dtype, layout=layout)
            drifts, squares = ops.project_drift(operands_of([problem]), "native")
            exact, allowed = exact_drift(problem.weight, problem), tolerance(instruction_set, basis_dtype, form)
            # A block cancels most of the sum, so that errors are compared with the sum.
            size = exact if problem.block is None else exact + problem.block.double()
            if form != "full":
                assert drifts[0].dtype == torch.float32
                assert float((drifts[0].double() - exact).norm()) <= allowed * float(size.norm())
            square = float(exact.square().sum())
            spread = allowed * float(size.norm())
            assert abs(float(squares[0]) - square) <= 2 * spread * square**0.5 + spread**2 + 1e-6 * square


@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("accumulate", [True, False])
def test_gradient(layout: Layout, grad_dtype: torch.dtype, accumulate: bool, instruction_set: str) -> None:
    for m, n, rank in SHAPES:
        for basis_dtype in (torch.bfloat16, torch.float32):
            left, right = orthonormal(m, rank, basis_dtype, seed=1), orthonormal(n, rank, basis_dtype, seed=2)
            drift = random_matrix(rank, rank, seed=3)
            existing = random_matrix(m, n, grad_dtype, scale=0.01, seed=4)
            grad = laid_out(existing if accumulate else torch.full_like(existing, float("nan")), layout)
            scales = torch.tensor([-0.7])
            ops.pull_back_([grad], ops.Operands(lefts=[left], rights=[right]), [drift], scales, accumulate, "native")
            exact = exact_pull(drift, left, right, float(scales))
            allowed = 2 * tolerance(instruction_set, basis_dtype, "base") * float(exact.norm())
            if accumulate:
                exact = exact + existing.double()
            rounding = torch.finfo(grad_dtype).eps / 2 * float(exact.norm()) + 1e-7
            assert float((grad.double() - exact).norm()) <= allowed + rounding


@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_full_gradient(grad_dtype: torch.dtype, instruction_set: str) -> None:
    for dtype in DTYPES:
        problem = make_problem("full", (33, 70), 0, dtype)
        operands = operands_of([problem])
        existing = random_matrix(33, 70, grad_dtype)
        grad = existing.clone()
        ops.pull_back_([grad], operands, [torch.empty(0, 0)], torch.tensor([0.5]), True, "native")
        exact = existing.double() + exact_gradient(problem.weight, problem, 0.5)
        bound = torch.finfo(grad_dtype).eps * exact.abs() / 2 + 1e-6
        assert bool(((grad.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["base", "full"])
def test_exactly_zero_at_the_base(form: Form, dtype: torch.dtype, instruction_set: str) -> None:
    for layout in LAYOUTS:
        for base_dtype in DTYPES:
            problem = make_problem(form, (40, 70), 9, dtype, base_dtype=base_dtype, drift=0.0, layout=layout)
            drifts, squares = ops.project_drift(operands_of([problem]), "native")
            assert not drifts[0].any() and not squares.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_exactly_zero_with_a_block_of_the_same_arithmetic(dtype: torch.dtype, instruction_set: str) -> None:
    for shape in ((40, 300), (300, 40)):
        weight = random_matrix(*shape, dtype)
        anchor = rk.Anchor.from_weight(weight, 20, keep_base=False)
        assert anchor.arithmetic == f"native:{instruction_set}:{str(dtype)[6:]}"
        for layout in LAYOUTS:
            laid = laid_out(weight, layout)
            for threads in (1, 2, 3):
                assert call_with_threads(threads, partial(rk.rotation_penalty, laid, anchor)) == 0


def call_with_threads(threads: int, call: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("form", FORMS)
def test_same_bits_for_every_number_of_threads(form: Form, instruction_set: str) -> None:
    def run() -> list[Tensor]:
        operands = operands_of([problem])
        drifts, squares = ops.project_drift(operands, "native")
        grads = ops.pull_back(operands.for_pull_back(), drifts, squares, torch.float32, "native")
        return [*drifts, squares, *grads]

    for shape in ((300, 700), (700, 300), (64, 100)):
        problem = make_problem(form, shape, 40, torch.bfloat16)
        first = call_with_threads(1, run)
        for threads in (1, 2, 3, 5):
            for expected, actual in zip(first, call_with_threads(threads, run), strict=True):
                assert torch.equal(expected, actual)


def test_callers_side_by_side() -> None:
    problem = make_problem("base", (300, 200), 33, torch.bfloat16)
    expected = ops.project_drift(operands_of([problem]), "native")[0][0]
    wrong: list[int] = []

    def call() -> None:
        for i in range(20):
            if not torch.equal(ops.project_drift(operands_of([problem]), "native")[0][0], expected):
                wrong.append(i)

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


@pytest.mark.parametrize("split", [0, 1, 69, 70, 71, 500, 1234, 40 * 70 - 1, 40 * 70])
@pytest.mark.parametrize("wide", [True, False])
def test_flat_shards_add_up(split: int, wide: bool, instruction_set: str) -> None:
    rows, cols = (40, 70) if wide else (70, 40)
    problem = make_problem("base", (rows, cols), 7, torch.float32)
    assert problem.base is not None and problem.left is not None and problem.right is not None
    module = importlib.import_module("rpsft_kernels._native")
    total = torch.zeros(7, 7)
    gradient = torch.full((rows * cols,), float("nan"))
    drift_to_pull = random_matrix(7, 7)
    for begin, end in ((0, split), (split, rows * cols)):
        if begin == end:
            continue
        first, last = begin // cols, -(-end // cols)
        head, tail = begin - first * cols, last * cols - end
        # Each range lies in memory of its own, which is exactly as long.
        weight = problem.weight.reshape(-1)[begin:end].clone()
        base = problem.base.reshape(-1)[begin:end].clone()
        pulled = torch.empty(end - begin)
        left = problem.left[first:last]

        def matrix(flat: Tensor, lacks: int = head, height: int = last - first) -> Any:
            address = flat.data_ptr() - lacks * flat.element_size()
            return module.Matrix(address, module.Dtype.float32, height, cols, cols, 1)

        drift, square = torch.empty(7, 7), torch.empty(1)
        subspaces = [
            module.Matrix(
                basis.data_ptr(),
                getattr(module.Dtype, str(basis.dtype).removeprefix("torch.")),
                *basis.shape,
                *basis.stride(),
            )
            for basis in (left, problem.right)
        ]
        projection = module.Projection(
            matrix(weight),
            matrix(base),
            *subspaces,
            block=0,
            drift=drift.data_ptr(),
            square=square.data_ptr(),
            head=head,
            tail=tail,
        )
        module.project_drift([projection], instruction_set, 2)
        total += drift
        pull_back = module.Pullback(
            matrix(pulled),
            *subspaces,
            weight=module.Matrix(),
            base=module.Matrix(),
            drift=drift_to_pull.data_ptr(),
            scale=0.5,
            head=head,
            tail=tail,
        )
        module.pull_back([pull_back], False, instruction_set, 2)
        gradient[begin:end] = pulled
    allowed = tolerance(instruction_set, torch.bfloat16, "base")
    assert relative_error(total, exact_drift(problem.weight, problem)) <= allowed
    exact = exact_pull(drift_to_pull, problem.left, problem.right, 0.5)
    assert relative_error(gradient.view(rows, cols), exact) <= 2 * allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_whole_step(dtype: torch.dtype, instruction_set: str) -> None:
    weights = [(random_matrix(*shape, dtype, scale=0.2)) for shape in ((90, 60), (60, 90), (30, 5))]
    anchors = [rk.Anchor.from_weight(weight, 20) for weight in weights]
    moved = [
        (w.double() + random_matrix(*w.shape, torch.float64, scale=0.02, seed=i)).to(dtype).requires_grad_()
        for i, w in enumerate(weights)
    ]
    for _ in range(2):
        value = rk.accumulate_rotation_grad_(moved, anchors, 0.25)
        rk.rotation_penalty(moved, anchors).mul(0.25).backward()
    exact = sum(float(exact_penalty(w.detach(), a)) for w, a in zip(moved, anchors, strict=True))
    assert float(value) == pytest.approx(exact, rel=5e-3)
    for weight, anchor in zip(moved, anchors, strict=True):
        assert weight.grad is not None
        limit = 0.01 if dtype == torch.bfloat16 else 0.006
        assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor, 2.0)) <= limit


def test_subspaces_of_any_layout_and_dtype() -> None:
    problem = make_problem("base", (60, 90), 11, torch.float32, basis_dtype=torch.float32)
    operands = operands_of([problem])
    plain = ops.project_drift(operands, "native")[0][0]
    (left,), (right,) = operands.lefts, operands.rights
    strided = operands._replace(lefts=[laid_out(left, "transposed")], rights=[laid_out(right, "transposed")])
    assert torch.equal(ops.project_drift(strided, "native")[0][0], plain)
    wide = operands._replace(lefts=[left.double()], rights=[right.double()])
    assert torch.equal(ops.project_drift(wide, "native")[0][0], plain)


def test_a_base_in_float64_is_read_as_the_weight_holds_it() -> None:
    problem = make_problem("base", (30, 20), 5, torch.bfloat16, base_dtype=torch.float64)
    drift = ops.project_drift(operands_of([problem]), "native")[0][0]
    assert relative_error(drift, exact_drift(problem.weight, problem)) <= 2**-8


def test_a_gradient_in_float64_is_refused() -> None:
    grad = torch.zeros(4, 5, dtype=torch.float64)
    operands = ops.Operands(lefts=[orthonormal(4, 2)], rights=[orthonormal(5, 2)])
    with pytest.raises(ValueError, match="backend 'native': got a gradient in float64, expected bfloat16, float16 or"):
        ops.pull_back_([grad], operands, [torch.ones(2, 2)], torch.ones(1), True, "native")
    assert not grad.any()


def test_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_ISA", "sse9")
    with pytest.raises(ValueError, match="environment variable RPSFT_ISA: got 'sse9', expected one of .*'portable'"):
        rk.rotation_penalty(torch.ones(6, 5), rk.Anchor.from_weight(torch.eye(6, 5), 2))


def test_an_instruction_set_that_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("rpsft_kernels._native")
    known = {"amx_bf16", "avx512_bf16", "avx512", "avx2", "portable"}
    missing = native.missing_instruction_sets()
    assert known == {*native.instruction_sets(), *missing}
    for name, reason in missing.items():
        monkeypatch.setenv("RPSFT_ISA", name)
        with pytest.raises(ValueError, match=re.escape(f"{name} cannot run here: {reason}; unset it for the best")):
            native.instruction_set()
        with pytest.raises(ValueError, match=re.escape(f"got '{name}', which cannot run here: {reason}")):
            module.project_drift([], name, 1)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang++ here")
def test_clang_takes_what_asks_the_processor() -> None:
    csrc = Path(__file__).resolve().parents[2] / "csrc"
    command = ["clang++", "-std=c++17", "-fsyntax-only", f"-I{csrc}", f"-I{csrc}/include", f"{csrc}/cpu/engine.cpp"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_workspace_is_bounded() -> None:
    module = importlib.import_module("rpsft_kernels._native")
    for rank in (128, 384, 768):
        alone, two = (module.workspace_bytes(rank, native.instruction_set(), threads) for threads in (1, 2))
        assert alone < two <= 2 * alone
        # Each thread has a block of T, a packed block of the weight and a packed panel of a basis.
        assert two - alone <= 1 << 20


def test_without_the_engine_the_package_works_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def import_without_engine(name: str) -> Any:
        if name == "rpsft_kernels._native":
            raise ModuleNotFoundError("No module named 'rpsft_kernels._native'", name=name)
        return importlib.import_module(name)

    monkeypatch.setattr(native, "importlib", SimpleNamespace(import_module=import_without_engine))
    native._load.cache_clear()
    native.instruction_sets.cache_clear()
    try:
        assert "this installation carries no compiled CPU engine" in str(native.unavailable(CPU, torch.float32))
        assert ops.resolve_backend(CPU, torch.float32) == "torch"
        assert native.instruction_sets() == ()
        with pytest.raises(ValueError, match="backend 'native': this installation carries no compiled CPU engine"):
            native.instruction_set()
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
        native.instruction_sets.cache_clear()
    assert native.unavailable(CPU, torch.float32) is None


class StandIn:
    """The engine with one more instruction set, which computes as the portable one does, or leaves a part out."""

    def __init__(self, left_out: str) -> None:
        self._engine = native._load()[0]
        self._left_out = left_out
        self.Matrix, self.Dtype = self._engine.Matrix, self._engine.Dtype
        self.Projection, self.Pullback = self._engine.Projection, self._engine.Pullback

    def project_drift(self, items: Any, instruction_set: str, threads: int) -> None:
        if instruction_set == "amx_bf16":
            if self._left_out == "projections":
                return
            instruction_set = "portable"
        self._engine.project_drift(items, instruction_set, threads)

    def pull_back(self, items: Any, accumulate: bool, instruction_set: str, threads: int) -> None:
        if instruction_set == "amx_bf16":
            if self._left_out == "gradients":
                return
            instruction_set = "portable"
        self._engine.pull_back(items, accumulate, instruction_set, threads)


@pytest.mark.parametrize("left_out", ["nothing", "projections", "gradients"])
def test_an_instruction_set_that_was_never_run_must_agree_with_the_next(
    left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = StandIn(left_out)
    monkeypatch.setattr(native, "_load", lambda: (engine, None))
    monkeypatch.setattr(native, "instruction_sets", lambda: ("amx_bf16", "portable"))
    native._best_that_agrees.cache_clear()
    try:
        if left_out == "nothing":
            assert native.instruction_set() == "amx_bf16"
        else:
            with pytest.warns(UserWarning, match="amx_bf16 computes wrong numbers on this processor"):
                assert native.instruction_set() == "portable"
            assert native.instruction_set() == "portable"
            monkeypatch.setenv("RPSFT_ISA", "amx_bf16")
            assert native.instruction_set() == "amx_bf16"
    finally:
        native._best_that_agrees.cache_clear()


def test_a_package_without_the_engine_says_why(tmp_path: Path) -> None:
    package = tmp_path / "rpsft_kernels"
    package.mkdir()
    assert native._why_missing(package) == "it was not built"
    (tmp_path / "setup.py").touch()
    assert re.search(
        rf"sources in {re.escape(str(tmp_path))}, .*another folder, or pip install -e", native._why_missing(package)
    )
    (package / "_native_build.txt").write_text("no compiler\n")
    assert native._why_missing(package) == "no compiler"


@pytest.mark.parametrize(("found", "error"), [(3e38, "inf"), (float("nan"), "nan")])
def test_numbers_beyond_all_bounds_are_a_disagreement_and_no_error(
    found: float, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compute(name: str) -> tuple[Any, ...]:
        return (np.full((2, 2), found if name == "candidate" else 1, np.float32),) * 3

    monkeypatch.setattr(native_check, "_Problem", lambda *arguments: SimpleNamespace(compute=compute))
    with np.errstate(all="raise"):
        reason = native_check.find_disagreement(None, "candidate", "trusted")
    assert reason == f"C of a bfloat16 weight of shape (70, 133) is {error} off"
