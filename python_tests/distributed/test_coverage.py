"""Shards tile a weight exactly where their measures add up to the whole weight's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rpsft_kernels.distributed import Shard
from rpsft_kernels.distributed.coverage import MODULUS, measure

SHAPES = st.tuples(st.integers(1, 60), st.integers(1, 60))


def covered(shards: list[Shard], name: str = "layer.weight") -> bool:
    whole = measure(name, Shard.whole(shards[0].shape))
    return (sum(measure(name, shard) for shard in shards) - whole) % MODULUS == 0


@st.composite
def tilings(draw: st.DrawFn) -> list[Shard]:
    """A grid of rectangles or consecutive flat ranges, empty shards among them, in any order."""
    m, n = shape = draw(SHAPES)

    def spans(length: int) -> list[tuple[int, int]]:
        ends = sorted(draw(st.lists(st.integers(0, length), max_size=5)))
        return list(zip([0, *ends], [*ends, length], strict=True))

    if draw(st.booleans()):
        shards = [Shard.rectangle(shape, rows, cols) for rows in spans(m) for cols in spans(n)]
    else:
        shards = [Shard.range(shape, *span) for span in spans(m * n)]
    return draw(st.permutations(shards))


@given(tilings(), st.text(max_size=20))
def test_tilings_are_covered(shards: list[Shard], name: str) -> None:
    assert covered(shards, name)


@given(tilings(), st.data())
def test_a_gap_is_seen(shards: list[Shard], data: st.DataObject) -> None:
    lost = data.draw(st.sampled_from([i for i, shard in enumerate(shards) if shard.numel]))
    assert not covered([Shard.nothing(shard.shape) if i == lost else shard for i, shard in enumerate(shards)])


@given(tilings(), st.data())
def test_an_overlap_is_seen(shards: list[Shard], data: st.DataObject) -> None:
    total = shards[0].shape[0] * shards[0].shape[1]
    begin = data.draw(st.integers(0, total - 1))
    assert not covered([*shards, Shard.range(shards[0].shape, begin, data.draw(st.integers(begin + 1, total)))])


@given(tilings(), st.data())
def test_a_shard_in_the_place_of_another_is_seen(shards: list[Shard], data: st.DataObject) -> None:
    """The number of elements is right: only their places tell."""
    m, n = shards[0].shape
    begin, end = sorted(data.draw(st.lists(st.integers(0, m * n), min_size=2, max_size=2, unique=True)))
    other = data.draw(st.integers(0, m * n - (end - begin)))
    moved = Shard.range((m, n), other, other + end - begin)
    shards = [Shard.range((m, n), 0, begin), moved, Shard.range((m, n), end, m * n)]
    assert covered(shards) == (other == begin)


@pytest.mark.parametrize("swapped", [False, True])
def test_shards_of_two_weights_must_not_be_swapped(swapped: bool) -> None:
    """Summed over all weights, as a call does: each weight has points of its own."""
    top, bottom = Shard.rectangle((6, 4), (0, 2), (0, 4)), Shard.rectangle((6, 4), (2, 6), (0, 4))
    held = [("a", top), ("a", top if swapped else bottom), ("b", bottom if swapped else top), ("b", bottom)]
    total = sum(measure(name, shard) for name, shard in held)
    whole = sum(measure(name, Shard.whole((6, 4))) for name in ("a", "b"))
    assert ((total - whole) % MODULUS == 0) != swapped
