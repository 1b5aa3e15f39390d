from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from rpsft_kernels.costs import step_flops
from rpsft_kernels.distributed import Shard, divide
from rpsft_kernels.tools.models import MODELS

shapes = st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=12)


@settings(deadline=None)
@given(shapes, st.integers(1, 9), st.integers(1, 64))
def test_every_element_belongs_to_one_rank(listed: list[tuple[int, int]], size: int, rank: int) -> None:
    for shape, row in zip(listed, divide(listed, [min(rank, *s) for s in listed], size), strict=True):
        assert len(row) == size
        held = [part for part in row if part.numel]
        longer = 0 if shape[0] >= shape[1] else 1
        spans = sorted((part.rows, part.cols)[longer] for part in held)
        assert spans[0][0] == 0 and spans[-1][1] == shape[longer]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        # All ranks know whether one holds it all.
        assert {part.unsharded for part in row} == {len(held) == 1}
        assert held[0] == Shard.whole(shape) or len(held) > 1


def test_cuts_keep_rows_aligned() -> None:
    rows = divide([(4096, 512)], [64], 3)[0]
    assert [part.rows for part in rows] == [(0, 1344), (1344, 2752), (2752, 4096)]
    columns = divide([(512, 4096)], [64], 3)[0]
    assert [part.cols for part in columns] == [part.rows for part in rows]


def test_few_weights_of_a_large_model_are_cut() -> None:
    weights = MODELS["llama-3.1-8b"].weights()
    parts = divide(weights, [768] * len(weights), 8)
    assert all(row[0].unsharded for row in parts)
    busiest = max(sum(step_flops(row[i].bounds.shape, 768) for row in parts if row[i].numel) for i in range(8))
    assert busiest <= 1.1 * sum(step_flops(shape, 768) for shape in weights) / 8


def test_a_full_anchor_is_cheap() -> None:
    # At its rank the first is full: three ranks share the second almost alone.
    first, second = divide([(64, 4096), (4096, 4096)], [64, 64], 3)
    assert first[0].is_whole and all(part.numel for part in second)
