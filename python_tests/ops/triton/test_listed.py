"""The operations ask for exactly the kernels that are listed, and so compiled ahead of time.

The operations are called with everything that anchors, ``project`` and their gradients call them with; the launches are
only written down.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from planned import planned_for
from rpsft_kernels import ops
from rpsft_kernels.anchors.anchor import Anchor
from rpsft_kernels.anchors.tensors import compute_block, pad_rows
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.ops.triton import backend as triton_backend
from rpsft_kernels.ops.triton.aot.targets import DESCRIPTORS
from rpsft_kernels.ops.triton.device import Profile
from rpsft_kernels.ops.triton.fields import INDEX, WIDTH
from rpsft_kernels.ops.triton.tile_table import rank_classes
from rpsft_kernels.ops.triton.variants import Variant, list_variants
from support import laid_out

BOTH = (False, True)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BASES = (torch.bfloat16, torch.float32)
ARCHITECTURES = [*DESCRIPTORS, "interpreter"]
# Per way to lie: the wide shape, then a rank of each class. Rows enough for a sum that is split; tiles that divide and
# tiles that do not; and what no vector reads: every second column, one element off, odd sizes, W0 lying otherwise.
KINDS: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "even": ((512, 768), (32, 64, 128, 256)),
    "even transposed": ((512, 768), (32, 64, 128, 256)),
    "ragged": ((520, 776), (24, 56, 120, 264)),
    "ragged transposed": ((520, 776), (24, 56, 120, 264)),
    "small": ((40, 72), (8, 40, 72, 136)),
    "sliced": ((521, 776), (24, 56, 120, 264)),
    "shifted": ((521, 776), (24, 56, 120, 264)),
    "otherwise": ((520, 776), (24, 56, 120, 264)),
    "odd": ((521, 777), (23, 33, 127, 131)),
}


class Asked:
    """The variants that were asked for, each with the first call that did."""

    def __init__(self, architecture: str) -> None:
        self.architecture, self.descriptors = architecture, DESCRIPTORS.get(architecture, False)
        self.by: dict[Variant, Any] = {}
        self.call: Any = None

    @classmethod
    def of(cls, architecture: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
        """For the time of a test."""
        found = cls(architecture)
        # Nothing is launched, so nothing has to be there: not even the interpreter.
        monkeypatch.setattr(triton_backend, "unavailable", lambda device, dtype: None)
        # So few multiprocessors that wide tiles keep them busy; narrow ones are those of lower ranks.
        with planned_for(Profile(architecture, 2, found.descriptors), found._note):
            yield found

    def _note(self, variant: Variant, programs: int, arguments: tuple[Tensor, ...]) -> None:
        self.by.setdefault(variant, self.call)
        if variant.kernel == "drift":
            # Nothing computes C here, and an anchor refuses a block that is not finite.
            for row in arguments[0].reshape(-1, WIDTH).tolist():
                ctypes.memset(row[INDEX["DRIFT"]], 0, 4 * row[INDEX["RANK"]] ** 2)

    def listed(self) -> set[Variant]:
        return set(list_variants(self.architecture, self.descriptors, rank_classes()))

    def unlisted(self) -> dict[str, Any]:
        listed = self.listed()
        return {variant.label(): call for variant, call in self.by.items() if variant not in listed}


@pytest.fixture(params=ARCHITECTURES)
def asked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    yield from Asked.of(request.param, monkeypatch)


@pytest.fixture(params=["sm_80", "sm_90"])
def one_of_each(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Asked]:
    yield from Asked.of(request.param, monkeypatch)


def lying(shape: tuple[int, int], dtype: torch.dtype, kind: str) -> Tensor:
    m, n = shape
    if kind.endswith("transposed"):
        return torch.empty(n, m, dtype=dtype).T
    if kind == "sliced":
        return torch.empty(m, 2 * n, dtype=dtype)[:, ::2]
    if kind == "shifted":
        return torch.empty(m * n + 1, dtype=dtype)[1:].view(m, n)
    return torch.empty(m, n, dtype=dtype)


def basis(rows: int, rank: int, dtype: torch.dtype) -> Tensor:
    """A basis as anchors hold it where vectors can read that, else with rows of an odd length."""
    return torch.empty(rows, rank, dtype=dtype) if rank % 4 else pad_rows(torch.empty(rows, rank, dtype=dtype))


def all_calls() -> Iterator[tuple[Any, Callable[[], object]]]:
    """Every call of the operations, by all that may decide the variants, with its name."""
    for (kind, ((m, n), ranks)), tall in product(KINDS.items(), BOTH):
        shape = (n, m) if tall else (m, n)
        for number, dtype in product(range(4), BASES):
            bases = [basis(size, ranks[number], dtype) for size in shape]
            yield from forward_calls(kind, shape, bases)
            yield from backward_calls(kind, shape, bases)
        yield from full_calls(kind, shape)


def forward_calls(
    kind: str, shape: tuple[int, int], bases: Sequence[Tensor]
) -> Iterator[tuple[Any, Callable[[], object]]]:
    rank = bases[0].shape[1]
    for weight, base, block in product(DTYPES, (None, torch.float64, *DTYPES), BOTH):
        if block and base is not None:
            continue
        w = lying(shape, weight, kind)
        w0 = [] if base is None else [lying(shape, base, "even transposed" if kind == "otherwise" else kind)]
        blocks = [torch.empty(rank, rank)] if block else []
        call = ("drift", kind, shape, rank, bases[0].dtype, weight, base, block)
        operands = ops.Operands([w], [bases[0]], [bases[1]], w0, blocks)
        yield call, partial(ops.project_drift, operands, "triton")


def backward_calls(
    kind: str, shape: tuple[int, int], bases: Sequence[Tensor]
) -> Iterator[tuple[Any, Callable[[], object]]]:
    rank = bases[0].shape[1]
    drift, scales = torch.empty(rank, rank), torch.ones(1)
    for dtype, accumulate in product(DTYPES, BOTH):
        grad = lying(shape, dtype, kind)
        call = ("gradient", kind, shape, rank, bases[0].dtype, dtype, accumulate)
        operands = ops.Operands(lefts=[bases[0]], rights=[bases[1]])
        yield call, partial(ops.pull_back_, [grad], operands, [drift], scales, accumulate, "triton")


def full_calls(kind: str, shape: tuple[int, int]) -> Iterator[tuple[Any, Callable[[], object]]]:
    for weight, base in product(DTYPES, (torch.float64, *DTYPES)):
        w, w0 = lying(shape, weight, kind), lying(shape, base, kind)
        yield (
            ("full drift", kind, shape, weight, base),
            partial(ops.project_drift, ops.Operands([w], pretrained=[w0]), "triton"),
        )
        for dtype, accumulate in product(DTYPES, BOTH):
            grad = lying(shape, dtype, kind)
            operands, drifts = ops.Operands([w], pretrained=[w0]), [torch.empty(0, 0)]
            yield (
                ("full gradient", kind, shape, weight, base, dtype, accumulate),
                partial(ops.pull_back_, [grad], operands, drifts, torch.ones(1), accumulate, "triton"),
            )


def test_what_the_operations_ask_for_is_what_is_listed(asked: Asked) -> None:
    for call, run in all_calls():
        asked.call = call
        run()
    assert asked.unlisted() == {}, "asked for, but not listed"
    never = asked.listed() - asked.by.keys()
    assert [variant.label() for variant in never] == [], "listed, but never asked for"


def test_a_list_of_one_class_is_its_part_of_the_whole_list(one_of_each: Asked) -> None:
    """Any rank of a class stands for it, and every class has variants of its own."""
    ways = one_of_each.architecture, one_of_each.descriptors
    whole = set(list_variants(*ways, rank_classes()))
    parts = [set(list_variants(*ways, (rank,))) for rank in (20, 50, 100, 768)]
    assert set().union(*parts) == whole
    for part, rank in zip(parts, rank_classes(), strict=True):
        assert part == set(list_variants(*ways, (rank,)))


# -- through the public functions ------------------------------------------------------------------------


def weight_of(m: int, n: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(m, n).to(dtype)


@pytest.mark.parametrize("shape", [(48, 80), (80, 48), (47, 81)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_form_is_anchored_evaluated_and_pulled_back(
    one_of_each: Asked, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    with ops.use_backend("triton"):
        for rank, keep_base, basis_dtype in product((8, 31, 64), BOTH, BASES):
            one_of_each.call = (shape, dtype, rank, keep_base, basis_dtype)
            pretrained = weight_of(*shape, dtype)
            anchor = Anchor.from_weight(pretrained, rank, keep_base=keep_base, basis_dtype=basis_dtype)
            if anchor.form == "block":
                anchor = anchor.rebuilt_block(pretrained)
            for layout in ("contiguous", "transposed", "sliced"):
                weight = nn.Parameter(laid_out(pretrained, layout))  # type: ignore[arg-type]
                rk.rotation_penalty(weight, anchor).backward()
                rk.accumulate_rotation_grad_(weight, anchor, 0.5)
                weight.grad = None
                rk.accumulate_rotation_grad_(weight, anchor, 0.5)
                penalty = rk.rotation_penalty(weight, anchor)
                (gradient,) = torch.autograd.grad(penalty, weight, create_graph=True)
                gradient.square().sum().backward()
                # The gradient of a sum is one number, expanded to a matrix.
                (gradient,) = torch.autograd.grad(rk.rotation_penalty(weight, anchor), weight, create_graph=True)
                gradient.sum().backward()
    assert {"project", "drift", "pull", "gradient"} <= {variant.kernel for variant in one_of_each.by}
    assert one_of_each.unlisted() == {}


def test_weights_cast_after_they_were_anchored(one_of_each: Asked) -> None:
    with ops.use_backend("triton"):
        for before, after, rank in product(DTYPES, DTYPES, (8, 64)):
            one_of_each.call = (before, after, rank)
            pretrained = weight_of(48, 80, before)
            anchor = Anchor.from_weight(pretrained, rank)
            weight = nn.Parameter(pretrained.to(after))
            rk.accumulate_rotation_grad_(weight, anchor, 0.5)
    assert one_of_each.unlisted() == {}


@pytest.mark.parametrize("keep_base", BOTH)
def test_parts_of_weights(one_of_each: Asked, keep_base: bool) -> None:
    """Rows, columns, both, and flat ranges: their blocks when they are anchored, and each of their matrices later."""
    shape, rank = (48, 80), 16
    parts = [
        Shard.rectangle(shape, (0, 24), (0, 80)),
        Shard.rectangle(shape, (0, 48), (40, 80)),
        Shard.rectangle(shape, (13, 14), (3, 80)),
        Shard.range(shape, 0, 48 * 40),
        Shard.range(shape, 7, 48 * 40 + 13),
        Shard.range(shape, 165, 170),
    ]
    with ops.use_backend("triton"):
        for part, dtype, basis_dtype in product(parts, DTYPES, BASES):
            one_of_each.call = (part, dtype, basis_dtype)
            local = torch.randn(part.local_shape).to(dtype)
            held = part.bounds.shape
            left, right = (pad_rows(torch.randn(size, rank).to(basis_dtype)) for size in held)
            block, _ = compute_block(local, left, right, part)
            for tile, view in part.views(local):
                rows, cols = tile.within(part.bounds)
                bases = [view.clone()] if keep_base else []
                blocks = [] if keep_base or part.flat is not None else [block]
                drifts, squares = ops.project_drift(
                    ops.Operands([view], [left[rows]], [right[cols]], bases, blocks), "triton"
                )
                ops.pull_back_(
                    [view.clone()],
                    ops.Operands(lefts=[left[rows]], rights=[right[cols]]),
                    drifts,
                    squares,
                    True,
                    "triton",
                )
    assert one_of_each.unlisted() == {}


def test_project_takes_bases_of_any_dtype(one_of_each: Asked) -> None:
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    with ops.use_backend("triton"):
        for dtype, left, right, base, rank in product(DTYPES, dtypes, dtypes, (None, *dtypes), (3, 16)):
            one_of_each.call = (dtype, left, right, base, rank)
            weight = weight_of(20, 24, dtype).requires_grad_()
            bases = torch.randn(20, rank).to(left), torch.randn(24, rank).to(right)
            w0 = None if base is None else torch.randn(20, 24).to(base)
            rk.project(weight, *bases, w0).sum().backward()
    assert one_of_each.unlisted() == {}


def test_the_operations_take_bases_of_two_dtypes(one_of_each: Asked) -> None:
    """Both are read as float32, as the other backends do it."""
    weight, left, right = torch.zeros(20, 24), torch.zeros(20, 8).half(), torch.zeros(24, 8).bfloat16()
    drifts, squares = ops.project_drift(ops.Operands([weight], [left], [right]), "triton")
    ops.pull_back_([weight], ops.Operands(lefts=[left], rights=[right]), drifts, squares, True, "triton")
    types = {dict(variant.constants).get("BASIS_TYPE", "fp32") for variant in one_of_each.by}
    assert types == {"fp32"}
    assert one_of_each.unlisted() == {}
