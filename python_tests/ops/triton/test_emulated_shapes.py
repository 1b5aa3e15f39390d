"""The warp-specialised kernels at awkward shapes, in the emulator: single tiles, tails, many weights, cut sums, NaN."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from accuracy import check_drifts, check_pulled
from compiling import Compiler
from emulated import moved, numbers, placed
from emulation import NEWEST, WHY_NEWEST, Emulator
from rpsft_kernels.ops import Operands
from rpsft_kernels.ops.triton import backend as kernels
from rpsft_kernels.ops.triton import project_drift
from support import Problem, operands_of

pytestmark = pytest.mark.skipif(not NEWEST, reason=WHY_NEWEST)
BF16, FP32 = torch.bfloat16, torch.float32
# The shorter side, the longer side, and the rank.
Shape = tuple[int, int, int]
# Three programs share the tiles of a launch.
LAUNCHES: dict[str, tuple[Shape, ...]] = {
    "one tile": ((40, 72, 16),),
    "one step": ((24, 32, 8),),
    "whole tiles": ((128, 256, 32),),
    # Each program replaces its descriptors after every tile, and the ring holds several of them.
    "many of one tile": tuple((8 + 8 * i, 128 - 8 * (i % 3), 4 + 4 * (i % 8)) for i in range(13)),
    "unlike": ((8, 16, 4), (136, 264, 32), (64, 72, 12), (200, 328, 28), (8, 520, 20)),
    "odd": ((135, 259, 20), (7, 13, 4), (129, 130, 32), (63, 65, 32)),
    "k = 48": ((136, 328, 48), (56, 72, 36), (128, 192, 64)),
    "k = 128": ((136, 264, 128), (16, 40, 68), (128, 136, 124)),
    "k = 200": ((264, 328, 200), (16, 24, 132), (136, 144, 136), (128, 136, 256)),
}


class Form(NamedTuple):
    """Dtypes of W and of W0 (None: B is subtracted), and how W lies: taller than wide, and by columns."""

    weight: torch.dtype = BF16
    base: torch.dtype | None = BF16
    tall: bool = False
    by_columns: bool = False


FORMS = (
    Form(),
    Form(tall=True),
    Form(by_columns=True),
    Form(tall=True, by_columns=True),
    Form(base=None),
    Form(base=None, tall=True),
    Form(FP32, FP32),
    Form(FP32, BF16, tall=True),
)
ORDERS = ("forward", "reverse", "random")


def lie(matrix: Tensor, by_columns: bool) -> Tensor:
    """The same matrix at a multiple of 16 bytes and of no more, with up to 32 bytes of nobody's between its rows."""
    if by_columns:
        return lie(matrix.T, False).T
    rows, cols = matrix.shape
    frame = placed(matrix.new_full((rows, -(-cols // 8) * 8), float("nan")), "aligned")
    return frame[:, :cols].copy_(matrix)


def make(form: Form, shapes: Sequence[Shape]) -> list[Problem]:
    problems = []
    for i, (rows, cols, k) in enumerate(shapes):
        m, n = (cols, rows) if form.tall else (rows, cols)
        weight, base = moved((m, n), form.weight, form.base or form.weight, i)
        left, right = (numbers(size, k, size**-0.5, 7 + i).to(BF16) for size in (m, n))
        block = None
        if form.base is None:
            block = placed((left.double().T @ base.double() @ right.double()).float(), "contiguous")
        problems.append(
            Problem(
                lie(weight, form.by_columns),
                lie(left, False),
                lie(right, False),
                None if form.base is None else lie(base, form.by_columns),
                block,
            )
        )
    return problems


class Drifts(NamedTuple):
    drifts: list[Tensor]
    squares: Tensor
    launched: list[str]


def project(compiler: Compiler, problems: Sequence[Problem], order: str = "forward") -> Drifts:
    """C of each, and their squares, all of which must have been written."""
    emulator = Emulator("sm_90", compiler, order)
    operands = operands_of(problems)
    emulator.give(*(tensor for kind in operands for tensor in kind))
    with emulator:
        drifts, squares = kernels.project_drift(operands)
    assert [emulator.unwritten_bytes(result) for result in (*drifts, squares)] == [0] * (len(drifts) + 1)
    assert all(stats.hazards == [] for _, stats in emulator.stats)
    return Drifts(list(drifts), squares, [variant.kernel for variant, _ in emulator.stats])


class Pull(NamedTuple):
    """Dtype of G, whether it is added to, and how it lies."""

    grad: torch.dtype = BF16
    accumulate: bool = True
    tall: bool = False
    by_columns: bool = False


PULLS = (
    Pull(),
    Pull(tall=True),
    Pull(by_columns=True),
    Pull(tall=True, by_columns=True),
    Pull(accumulate=False),
    Pull(accumulate=False, tall=True),
    Pull(FP32),
    Pull(FP32, tall=True),
    Pull(FP32, accumulate=False, by_columns=True),
)


class Pulled(NamedTuple):
    before: list[Tensor]
    grads: list[Tensor]
    lefts: list[Tensor]
    rights: list[Tensor]
    drifts: list[Tensor]
    scales: Tensor

    def take(self, which: slice) -> Pulled:
        lists = (self.before[which], self.grads[which], self.lefts[which], self.rights[which], self.drifts[which])
        return Pulled(*lists, self.scales[which])


def prepare(pull: Pull, shapes: Sequence[Shape]) -> Pulled:
    pieces = Pulled([], [], [], [], [], torch.linspace(-2, 3, len(shapes)) + 0.25)
    for i, (rows, cols, k) in enumerate(shapes):
        m, n = (cols, rows) if pull.tall else (rows, cols)
        pieces.before.append(numbers(m, n, 1.0, i).to(pull.grad))
        pieces.grads.append(lie(pieces.before[-1], pull.by_columns))
        pieces.lefts.append(lie(numbers(m, k, 0.1, 7 + i).to(BF16), False))
        pieces.rights.append(lie(numbers(n, k, 0.1, 17 + i).to(BF16), False))
        pieces.drifts.append(placed(numbers(k, k, 1.0, 27 + i).float(), "contiguous"))
    return pieces


def pull_back(compiler: Compiler, pull: Pull, pieces: Pulled, order: str = "forward") -> list[str]:
    """Fill the gradients; returns the kernels."""
    emulator = Emulator("sm_90", compiler, order)
    emulator.give(*pieces.lefts, *pieces.rights, *pieces.drifts)
    emulator.give(*pieces.grads, unwritten=not pull.accumulate)
    operands = Operands(lefts=pieces.lefts, rights=pieces.rights)
    with emulator:
        kernels.pull_back_into(pieces.grads, operands, pieces.drifts, pieces.scales, pull.accumulate)
    assert [emulator.unwritten_bytes(grad) for grad in pieces.grads] == [0] * len(pieces.grads)
    assert all(stats.hazards == [] for _, stats in emulator.stats)
    return [variant.kernel for variant, _ in emulator.stats]


def check(pull: Pull, pieces: Pulled) -> None:
    for i, grad in enumerate(pieces.grads):
        before = pieces.before[i] if pull.accumulate else None
        scale = float(pieces.scales[i])
        check_pulled(grad, before, pieces.drifts[i], pieces.lefts[i], pieces.rights[i], scale)


def same_bits(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that sets into how many stretches sums over columns are cut, from now on."""

    def set_stretches(stretches_of: Callable[[int], int]) -> None:
        monkeypatch.setattr(project_drift, "stretches_of", stretches_of)
        project_drift.plan_forward.cache_clear()

    yield set_stretches
    project_drift.plan_forward.cache_clear()


@pytest.mark.parametrize("name", LAUNCHES)
def test_drifts(name: str, compiler: Compiler) -> None:
    for i, form in enumerate(FORMS):
        problems = make(form, LAUNCHES[name])
        results = project(compiler, problems, ORDERS[i % 3])
        assert results.launched[0] == "hopper_project"
        check_drifts(problems, results.drifts, results.squares)


@pytest.mark.parametrize("name", LAUNCHES)
def test_gradients(name: str, compiler: Compiler) -> None:
    for i, pull in enumerate(PULLS):
        pieces = prepare(pull, LAUNCHES[name])
        # The plain kernel takes gradients whose rows are not whole vectors, and reads the same P.
        gradient = "gradient" if name == "odd" else "hopper_gradient"
        assert pull_back(compiler, pull, pieces, ORDERS[i % 3]) == ["round", "hopper_pull", gradient]
        check(pull, pieces)


def test_rank_768(compiler: Compiler) -> None:
    shapes = ((128, 264, 768), (136, 192, 768))
    problems = make(Form(), shapes)
    results = project(compiler, problems, "random")
    check_drifts(problems, results.drifts, results.squares)
    pieces = prepare(Pull(), shapes)
    pull_back(compiler, Pull(), pieces, "random")
    check(Pull(), pieces)


@pytest.mark.parametrize("form", [Form(), Form(tall=True), Form(base=None), Form(FP32, FP32)])
@pytest.mark.parametrize("stretches", [2, 3, 5])
def test_cut_sums(stretches: int, form: Form, cut: Any, compiler: Compiler) -> None:
    """136 columns are three steps: a last stretch of 8 columns, one step each, and two stretches without any."""
    cut(lambda cols: stretches if cols == 136 else 1)
    problems = make(form, ((72, 136, 24), (40, 200, 32), (136, 136, 16)))
    results = project(compiler, problems, "random")
    check_drifts(problems, results.drifts, results.squares)


@pytest.mark.parametrize("form", [Form(), Form(base=None), Form(FP32, BF16, tall=True)])
def test_bits_do_not_depend_on_the_order(form: Form, compiler: Compiler) -> None:
    problems = make(form, LAUNCHES["many of one tile"] + LAUNCHES["unlike"])
    results = [project(compiler, problems, order) for order in ORDERS]
    assert all(same_bits((*results[0].drifts, results[0].squares), (*r.drifts, r.squares)) for r in results[1:])


@pytest.mark.parametrize("pull", [Pull(), Pull(FP32, tall=True), Pull(accumulate=False, by_columns=True)])
def test_bits_of_gradients_do_not_depend_on_the_order(pull: Pull, compiler: Compiler) -> None:
    results = []
    for order in ORDERS:
        pieces = prepare(pull, LAUNCHES["many of one tile"] + LAUNCHES["unlike"])
        pull_back(compiler, pull, pieces, order)
        results.append(pieces.grads)
    assert all(same_bits(results[0], grads) for grads in results[1:])


def test_bits_do_not_depend_on_neighbours(cut: Any, compiler: Compiler) -> None:
    cut(lambda cols: 3 if cols == 328 else 1)
    for form in (Form(), Form(base=None, tall=True)):
        problems = make(form, LAUNCHES["unlike"])
        together = project(compiler, problems)
        for i, problem in enumerate(problems):
            alone = project(compiler, [problem])
            assert same_bits([*alone.drifts, alone.squares], [together.drifts[i], together.squares[i : i + 1]])
    together_pull = prepare(Pull(), LAUNCHES["unlike"])
    pull_back(compiler, Pull(), together_pull)
    for i in range(len(together_pull.grads)):
        alone_pull = prepare(Pull(), LAUNCHES["unlike"]).take(slice(i, i + 1))
        pull_back(compiler, Pull(), alone_pull)
        assert same_bits(alone_pull.grads, together_pull.grads[i : i + 1])


def test_bits_do_not_depend_on_the_width_of_tiles(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    for form in (Form(), Form(FP32, FP32, tall=True)):
        problems = make(form, LAUNCHES["k = 200"])
        results, widths = [], []
        for time in (1e-3, 1e3):
            monkeypatch.setattr(project_drift, "_NARROW_TIME", time)
            project_drift.plan_forward.cache_clear()
            emulator = Emulator("sm_90", compiler)
            operands = operands_of(problems)
            emulator.give(*(tensor for kind in operands for tensor in kind))
            with emulator:
                drifts, squares = kernels.project_drift(operands)
            widths.append(emulator.stats[0][0].blocks[1])
            results.append((*drifts, squares))
        assert widths == [128, 256]
        assert same_bits(*results)
    monkeypatch.undo()
    project_drift.plan_forward.cache_clear()


@pytest.mark.parametrize(
    ("weight", "base"),
    [(BF16, BF16), (BF16, FP32), (torch.float16, BF16), (FP32, FP32), (BF16, None), (torch.float16, None)],
)
def test_zero_at_the_anchor(weight: torch.dtype, base: torch.dtype | None, cut: Any, compiler: Compiler) -> None:
    """Exactly zero; a block is what the same kernels made of W0, beside other weights."""
    cut(lambda cols: 3 if cols == 328 else 1)
    for tall in (False, True):
        problems = make(Form(weight, base, tall), LAUNCHES["unlike"])
        if base is None:
            bare = [replace(problem, block=None) for problem in problems]
            blocks = project(compiler, bare).drifts
            problems = [replace(problem, block=block) for problem, block in zip(bare, blocks, strict=True)][::-1]
        else:
            problems = [replace(p, weight=lie(p.base.to(weight), False)) for p in problems if p.base is not None]
        results = project(compiler, problems)
        assert results.launched[0] == "hopper_project"
        assert [int(drift.count_nonzero()) for drift in results.drifts] == [0] * len(problems)
        assert results.squares.count_nonzero() == 0


def test_nan_in_a_weight_shows(compiler: Compiler) -> None:
    for form in (Form(), Form(tall=True), Form(base=None), Form(FP32, FP32)):
        problems = make(form, LAUNCHES["unlike"])
        for i in (1, 3):
            problems[i].weight[-1, -1] = float("nan")
        results = project(compiler, problems)
        for i, drift in enumerate(results.drifts):
            assert int(drift.isnan().sum()) == (drift.numel() if i in (1, 3) else 0)
            assert bool(results.squares[i].isnan()) == (i in (1, 3))


@pytest.mark.parametrize("pull", [Pull(), Pull(FP32, tall=True), Pull(by_columns=True)])
def test_nan_in_a_gradient_stays_where_it_is(pull: Pull, compiler: Compiler) -> None:
    pieces = prepare(pull, LAUNCHES["unlike"])
    for grad in pieces.grads:
        grad[-1, -1] = grad[0, -1] = float("nan")
    pull_back(compiler, pull, pieces)
    for grad in pieces.grads:
        assert grad.isnan().nonzero().tolist() == [[0, grad.shape[1] - 1], [grad.shape[0] - 1, grad.shape[1] - 1]]


def test_nan_in_a_drift_shows(compiler: Compiler) -> None:
    pieces = prepare(Pull(), LAUNCHES["unlike"])
    pieces.drifts[3][-1, -1] = float("nan")
    pull_back(compiler, Pull(), pieces)
    assert [bool(grad.isnan().any()) for grad in pieces.grads] == [False, False, False, True, False]
    assert bool(pieces.grads[3].isnan().all())


@pytest.mark.parametrize("empty", [(0, 64), (64, 0), (0, 0)])
def test_empty_weights_beside_others(empty: tuple[int, int], compiler: Compiler) -> None:
    m, n = empty
    problems = make(Form(), ((40, 72, 16), (136, 144, 32)))
    nothing = Problem(*(torch.zeros(shape, dtype=BF16) for shape in ((m, n), (m, 16), (n, 16), (m, n))))
    problems.insert(1, nothing)
    results = project(compiler, problems)
    check_drifts(problems[::2], results.drifts[::2], results.squares[::2])
    assert results.drifts[1].count_nonzero() == 0 and float(results.squares[1]) == 0.0
    pieces = prepare(Pull(), ((40, 72, 16), (136, 144, 32), (24, 32, 16)))
    pieces.before[2] = pieces.grads[2] = torch.zeros(m, n, dtype=BF16)
    pieces.lefts[2], pieces.rights[2] = torch.zeros(m, 16, dtype=BF16), torch.zeros(n, 16, dtype=BF16)
    pull_back(compiler, Pull(), pieces)
    check(Pull(), pieces.take(slice(2)))
