"""The cost of staging an operation again: nothing, columns of the table, or a new plan. Nothing is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rpsft_kernels.ops import Operands
from rpsft_kernels.ops.triton import launch as triton_launch
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.fields import INDEX
from rpsft_kernels.ops.triton.full_form import FullProjection
from rpsft_kernels.ops.triton.layout import addresses_of
from rpsft_kernels.ops.triton.operation import Operation, facts_of
from rpsft_kernels.ops.triton.project_drift import Projection
from rpsft_kernels.ops.triton.pull_back import PullBack
from rpsft_kernels.ops.triton.scratch import Scratch, Sizes
from rpsft_kernels.ops.triton.table import SCALE, Table, float_bits
from rpsft_kernels.ops.triton.variants import Variant
from support import Layout, laid_out, random_matrix

CPU = torch.device("cpu")
PROFILE = Profile("sm_80", 8, False)
# Wide, tall, and wide: two groups, whose rows are not in the weights' order.
SHAPES = ((24, 40), (40, 24), (16, 48))
RANK = 8


class Bench:
    """A table and scratch memory; counts the launches that are prepared and the columns that change."""

    def __init__(self) -> None:
        self.table = Table(CPU, 16)
        self.scratch = Scratch(CPU)
        self.squares = torch.zeros(8)
        self.found: list[Variant] = []
        self._before: np.ndarray = np.zeros_like(self.table.host)

    def send(self, operation: Operation[Any, Any]) -> None:
        self.scratch.reserve(operation.sizes)
        operation.bind(self.scratch)
        self.table.send()

    def take_changes(self) -> set[str]:
        """The columns on the device that differ from those of the last call."""
        used = self.table._used
        now = self.table.memory.numpy().reshape(self.table.host.shape)[:used].copy()
        assert np.array_equal(now, self.table.host[:used]), "everything was sent"
        found = {name for name, at in INDEX.items() if not np.array_equal(now[:, at], self._before[:used, at])}
        self._before[:used] = now
        return found

    def column(self, operation: Operation[Any, Any], name: str) -> list[int]:
        rows = operation.rows
        found: list[int] = self.table.host[rows.first : rows.first + rows.count, INDEX[name]].tolist()
        return found


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench()

    def note(variant: Variant, *_: Any) -> Callable[[], None]:
        bench.found.append(variant)
        return lambda: None

    monkeypatch.setattr(triton_launch, "find_start", note)
    return bench


def matrices(layout: Layout = "contiguous", dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> list[Tensor]:
    return [random_matrix(*shape, dtype, seed=seed, layout=layout) for shape in SHAPES]


def make_operands(
    weights: list[Tensor], basis: torch.dtype = torch.bfloat16, base: torch.dtype | None = None
) -> Operands:
    lefts = [torch.zeros(weight.shape[0], RANK, dtype=basis) for weight in weights]
    rights = [torch.zeros(weight.shape[1], RANK, dtype=basis) for weight in weights]
    return Operands(weights, lefts, rights, [torch.zeros(w.shape, dtype=base or w.dtype) for w in weights])


def make_projection(bench: Bench) -> Projection:
    return Projection(bench.table.take(len(SHAPES)), CPU, PROFILE, bench.squares, 2)


def test_equal_tensors_change_nothing(bench: Bench) -> None:
    operation, operands = make_projection(bench), make_operands(matrices())
    operation.stage(operands, None)
    bench.send(operation)
    assert bench.take_changes() and {variant.kernel for variant in bench.found} == {"project", "drift", "squares"}
    bench.found.clear()
    for _ in range(2):
        operation.stage(operands, None)
        assert operation.is_bound(bench.scratch)
        bench.send(operation)
        assert bench.take_changes() == set() and bench.found == []


def test_rows_are_in_the_order_of_the_groups(bench: Bench) -> None:
    operation, operands = make_projection(bench), make_operands(matrices())
    operation.stage(operands, None)
    bench.send(operation)
    addresses = addresses_of(operands.weights)
    assert bench.column(operation, "WEIGHT") == [addresses[i] for i in (0, 2, 1)]
    assert bench.column(operation, "NUMBER") == [2, 4, 3], "squares lie by the weights' places, from the batch's first"
    assert bench.column(operation, "LEFT") == [
        operands.lefts[0].data_ptr(),
        operands.lefts[2].data_ptr(),
        operands.rights[1].data_ptr(),
    ]


def test_other_weights_that_lie_alike_move_their_column_alone(bench: Bench) -> None:
    operation, operands = make_projection(bench), make_operands(matrices())
    operation.stage(operands, None)
    bench.send(operation)
    bench.take_changes()
    bench.found.clear()
    others = matrices(seed=1)
    operation.stage(operands._replace(weights=others), None)
    assert operation.is_bound(bench.scratch)
    bench.send(operation)
    assert bench.take_changes() == {"WEIGHT"} and bench.found == []
    assert bench.column(operation, "WEIGHT") == [others[i].data_ptr() for i in (0, 2, 1)]


def test_drifts_of_their_own_move_their_column_alone(bench: Bench) -> None:
    operation, operands = make_projection(bench), make_operands(matrices())
    operation.stage(operands, None)
    bench.send(operation)
    bench.take_changes()
    bench.found.clear()
    drifts = [torch.zeros(RANK, RANK) for _ in SHAPES]
    operation.stage(operands, addresses_of(drifts))
    bench.send(operation)
    assert bench.take_changes() == {"DRIFT"}
    operation.stage(operands, None)
    bench.send(operation)
    inside = bench.scratch.drifts
    ends = inside.data_ptr(), inside.data_ptr() + inside.nbytes
    assert all(ends[0] <= at < ends[1] for at in bench.column(operation, "DRIFT"))


@pytest.mark.parametrize("what", ["strides", "dtype", "alignment"])
def test_what_lies_otherwise_is_planned_anew_on_the_same_rows(what: str, bench: Bench) -> None:
    neighbour, operation = make_projection(bench), make_projection(bench)
    for each in (neighbour, operation):
        each.stage(make_operands(matrices()), None)
        bench.send(each)
    rows, kept = operation.rows, bench.table.host[:3].copy()
    others = matrices("transposed") if what == "strides" else matrices(dtype=torch.float32, seed=1)
    if what == "alignment":
        frames = [torch.zeros(m * n + 1, dtype=torch.bfloat16) for m, n in SHAPES]
        others = [frame[1:].view(shape) for frame, shape in zip(frames, SHAPES, strict=True)]
    bench.found.clear()
    operands = make_operands(others)
    operation.stage(operands, None)
    assert not operation.is_bound(bench.scratch) and neighbour.is_bound(bench.scratch)
    bench.send(operation)
    assert operation.rows is rows and {variant.kernel for variant in bench.found} == {"project", "drift", "squares"}
    assert sorted(bench.column(operation, "WEIGHT")) == sorted(addresses_of(others))
    assert sorted(bench.column(operation, "BASE")) == sorted(addresses_of(operands.pretrained))
    assert np.array_equal(bench.table.host[:3], kept), "the rows of others are as they were"
    bench.take_changes()


def test_casts_of_an_anchor_are_made_anew_and_live_until_the_next(bench: Bench) -> None:
    """Kernels cannot read these anchors as they are; the casts change only columns of the table."""
    operation = make_projection(bench)
    operands = make_operands(matrices(), basis=torch.float16, base=torch.float64)
    operation.stage(operands, None)
    bench.send(operation)
    for _ in range(2):
        cast = {piece.data_ptr() for piece in operation._held}
        assert len(cast) == 3 * len(SHAPES)
        named = [at for name in ("LEFT", "RIGHT", "BASE") for at in bench.column(operation, name)]
        assert set(named) == cast
        bench.take_changes()
        bench.found.clear()
        operation.stage(operands, None)
        bench.send(operation)
        assert bench.take_changes() <= {"LEFT", "RIGHT", "BASE"} and bench.found == []


def test_casts_go_when_a_call_ends(bench: Bench) -> None:
    operation, operands = make_projection(bench), make_operands(matrices(), basis=torch.float16)
    operation.stage(operands, None)
    bench.send(operation)
    operation.release()
    assert operation._held == []
    operation.stage(operands, None)
    assert len(operation._held) == 2 * len(SHAPES), "cast again"


def test_what_is_refused_is_refused_again_and_then_planned_anew(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    operation, others = make_projection(bench), matrices("transposed")
    operation.stage(make_operands(matrices()), None)
    bench.send(operation)
    find = triton_launch.find_start

    def refuse(variant: Variant, *_: Any) -> Callable[[], None]:
        raise ValueError(f"{variant.label()} is not launched")

    monkeypatch.setattr(triton_launch, "find_start", refuse)
    operands = make_operands(others)
    for _ in range(2):
        operation.stage(operands, None)
        with pytest.raises(ValueError, match="is not launched"):
            bench.send(operation)
    monkeypatch.setattr(triton_launch, "find_start", find)
    bench.found.clear()
    operation.stage(operands, None)
    bench.send(operation)
    assert bench.found
    assert sorted(bench.column(operation, "WEIGHT")) == sorted(addresses_of(others))
    assert sorted(bench.column(operation, "BASE")) == sorted(addresses_of(operands.pretrained))


def test_a_cast_that_finds_no_memory_leaves_nothing_half_planned(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = make_projection(bench)
    operation.stage(make_operands(matrices()), None)
    bench.send(operation)
    others = make_operands(matrices("transposed"), basis=torch.float16)

    def no_memory(_: Operands) -> Operands:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as context:
        context.setattr(Operands, "cast_subspaces", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            operation.stage(others, None)
    bench.found.clear()
    operation.stage(others, None)
    bench.send(operation)
    assert {variant.kernel for variant in bench.found} == {"project", "drift", "squares"}
    assert sorted(bench.column(operation, "WEIGHT")) == sorted(addresses_of(others.weights))
    sides = set(bench.column(operation, "LEFT") + bench.column(operation, "RIGHT"))
    assert sides == {piece.data_ptr() for piece in operation._held}


def test_launches_are_made_anew_where_the_scratch_memory_has_moved(bench: Bench) -> None:
    operation, operands = make_projection(bench), make_operands(matrices())
    operation.stage(operands, None)
    bench.send(operation)
    bench.take_changes()
    bench.found.clear()
    bench.scratch.reserve(Sizes(planes=1 << 20, slots=1 << 16, drifts=1 << 16))
    assert not operation.is_bound(bench.scratch)
    bench.send(operation)
    assert bench.take_changes() == {"PLANES", "DRIFT"}
    assert {variant.kernel for variant in bench.found} == {"project", "drift", "squares"}
    assert min(bench.column(operation, "PLANES")) == bench.scratch.planes.data_ptr()


def test_gradients_follow_the_projection_that_leaves_their_drifts(bench: Bench) -> None:
    operands = make_operands(matrices())
    first = make_projection(bench)
    pull = PullBack(bench.table.take(2), CPU, PROFILE, True, None)
    first.stage(operands, None)
    bench.send(first)
    members = [2, 1]
    grads = [torch.zeros(SHAPES[i]) for i in members]
    pull.stage(
        operands.pick(members).for_pull_back(), facts_of(grads), addresses_of(grads), (first, members), [1.0, 2.0]
    )
    bench.send(pull)
    assert bench.column(pull, "DRIFT") == [first.scratch_drifts[i] for i in members]
    before = bench.column(pull, "DRIFT")
    bench.scratch.reserve(Sizes(drifts=1 << 18))
    for operation in (first, pull):
        bench.send(operation)
    assert bench.column(pull, "DRIFT") == [first.scratch_drifts[i] for i in members] != before


def test_scales_move_their_column_alone(bench: Bench) -> None:
    operands = make_operands(matrices()).for_pull_back()
    pull = PullBack(bench.table.take(3), CPU, PROFILE, True, None)
    grads, drifts = [torch.zeros(shape) for shape in SHAPES], [torch.zeros(RANK, RANK) for _ in SHAPES]

    def stage(scales: list[float], targets: list[Tensor]) -> None:
        pull.stage(operands, facts_of(targets), addresses_of(targets), addresses_of(drifts), scales)
        bench.send(pull)

    stage([1.0, 2.0, 3.0], grads)
    assert bench.column(pull, SCALE) == float_bits([1.0, 3.0, 2.0])
    bench.take_changes()
    bench.found.clear()
    stage([1.0, 2.0, 4.0], grads)
    assert bench.take_changes() == {SCALE} and bench.found == []
    assert bench.column(pull, SCALE) == float_bits([1.0, 4.0, 2.0])
    others = [torch.zeros(shape) for shape in SHAPES]
    stage([1.0, 2.0, 4.0], others)
    assert bench.take_changes() == {"GRAD"} and bench.found == []
    # Planned anew, the scales are still there.
    flipped = [laid_out(grad, "transposed") for grad in others]
    stage([1.0, 2.0, 4.0], flipped)
    assert bench.found
    by_address = dict(zip(bench.column(pull, "GRAD"), bench.column(pull, SCALE), strict=True))
    assert [by_address[grad.data_ptr()] for grad in flipped] == float_bits([1.0, 2.0, 4.0])


def test_full_anchors_are_staged_alike(bench: Bench) -> None:
    operation = FullProjection(bench.table.take(3), CPU, PROFILE, bench.squares, 0)
    operands = Operands(matrices(), pretrained=matrices(seed=1))
    operation.stage(operands, None)
    bench.send(operation)
    assert {variant.kernel for variant in bench.found} == {"full_drift", "squares"}
    bench.take_changes()
    bench.found.clear()
    operation.stage(operands._replace(weights=matrices(seed=2)), None)
    bench.send(operation)
    assert bench.take_changes() == {"WEIGHT"} and bench.found == []
