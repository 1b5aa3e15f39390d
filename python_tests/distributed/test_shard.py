from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rpsft_kernels.distributed import Rect, Shard

sizes = st.integers(1, 9)


@st.composite
def parts(draw: st.DrawFn) -> Shard:
    shape = draw(sizes), draw(sizes)
    if draw(st.booleans()):
        begin, end = sorted((draw(st.integers(0, shape[0] * shape[1])), draw(st.integers(0, shape[0] * shape[1]))))
        return Shard.range(shape, begin, end)
    rows, cols = (tuple(sorted((draw(st.integers(0, size)), draw(st.integers(0, size))))) for size in shape)
    return Shard.rectangle(shape, rows, cols)  # type: ignore[arg-type]


def elements(part: Shard) -> set[int]:
    _m, n = part.shape
    if part.flat is not None:
        return set(range(*part.flat))
    return {r * n + c for r in range(*part.rows) for c in range(*part.cols)}


@given(parts())
def test_tiles_are_the_part_in_order_and_once(part: Shard) -> None:
    n = part.shape[1]
    listed = [r * n + c for tile in part.rects for r in range(*tile.rows) for c in range(*tile.cols)]
    assert listed == sorted(elements(part)) and len(listed) == part.numel
    assert len(part.rects) <= 3
    for tile in part.rects:
        assert part.rows[0] <= tile.rows[0] and tile.rows[1] <= part.rows[1]
        assert part.cols[0] <= tile.cols[0] and tile.cols[1] <= part.cols[1]


@given(parts())
def test_views_hold_what_the_whole_does(part: Shard) -> None:
    m, n = part.shape
    whole = torch.arange(m * n).view(m, n)
    local = part.of(whole)
    assert (tuple(local.shape) == part.local_shape) or not part.numel
    for tile, view in part.views(local):
        assert torch.equal(view, whole[tile.rows[0] : tile.rows[1], tile.cols[0] : tile.cols[1]])
        view += 1000
    # They are views of the local tensor, and of the whole where that is contiguous.
    assert set((whole.view(-1) >= 1000).nonzero().flatten().tolist()) == elements(part)


@given(parts())
def test_empty_parts_touch_nothing(part: Shard) -> None:
    if not part.numel:
        assert part.rects == [] and part.bounds.shape == (0, 0) and part.local_shape == (0, 0)
        assert not part.is_whole


def test_what_is_whole() -> None:
    assert Shard.whole((3, 4)).is_whole and Shard.whole((3, 4)).unsharded
    assert Shard.range((3, 4), 0, 12).is_whole
    assert not Shard.rectangle((3, 4), (0, 3), (0, 3)).is_whole
    assert Shard.nothing((3, 4), unsharded=True).unsharded and not Shard.nothing((3, 4)).unsharded


def test_what_tiles_have_in_common() -> None:
    first, second = Rect((0, 4), (2, 6)), Rect((2, 9), (0, 3))
    assert first.common(second) == second.common(first) == Rect((2, 4), (2, 3))
    assert first.common(Rect((4, 5), (2, 6))) is None
    assert Rect((2, 4), (2, 3)).within(second) == (slice(0, 2), slice(2, 3))


@pytest.mark.parametrize("begin", [0, 3, 5, 10, 12])
def test_a_range_touches_only_the_columns_of_its_one_row(begin: int) -> None:
    part = Shard.range((4, 5), begin, begin + 2)
    assert part.bounds == Rect(
        (begin // 5, -(-(begin + 2) // 5)), (begin % 5, begin % 5 + 2) if begin % 5 < 4 else (0, 5)
    )
