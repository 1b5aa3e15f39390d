from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.distributed.tensor import Shard as Placement

import rpsft_kernels as rk
from rpsft_kernels.costs import anchor_bytes, step_flops
from rpsft_kernels.distributed.dtensor import shard_spans
from rpsft_kernels.distributed.partition import LAYOUTS, Layout, plan_shards
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.tools.cli import main
from rpsft_kernels.tools.models import MODELS
from rpsft_kernels.tools.shards import shard_costs

LLAMA = MODELS["llama-3.1-8b"].weights()
BLOCK = 4 * 768 * 768


def anchor_of(shard: Shard, rank: int, keep_base: bool, dtype: torch.dtype = torch.bfloat16) -> rk.Anchor:
    """An anchor of zeros, with bases in ``dtype``."""
    full = rank >= min(shard.shape)
    base = torch.zeros(shard.local_shape, dtype=torch.bfloat16) if keep_base or full else None
    rows, cols = shard.bounds.shape
    return rk.Anchor(
        left=None if full else torch.zeros(rows, rank, dtype=dtype),
        right=None if full else torch.zeros(cols, rank, dtype=dtype),
        base=base,
        block=None if base is not None else torch.zeros(rank, rank) if shard.numel else torch.zeros(0, 0),
        part=shard,
        shape=shard.shape,
        weight_dtype=torch.bfloat16,
        rank=min(rank, *shard.shape),
        energy=0.5,
    )


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_work_is_shared_out_evenly(layout: Layout, ranks: int) -> None:
    costs = shard_costs(LLAMA, 768, ranks, layout)
    total = sum(step_flops(shape, 768) for shape in LLAMA)
    assert len(costs.flops) == ranks
    # Tiles never take less than the undivided weight.
    assert sum(costs.flops) >= total
    assert max(costs.flops) <= 1.1 * total / ranks
    assert costs.share == pytest.approx(max(costs.flops) * ranks / total)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [1, 3, 64])
def test_every_element_is_on_one_rank(model: str, layout: Layout, ranks: int) -> None:
    shapes = MODELS[model].weights()
    assert sum(shard_costs(shapes, 768, ranks, layout).elements) == sum(m * n for m, n in shapes)


def test_rows_are_cut_like_those_of_dtensors() -> None:
    shapes = [(10, 7), (3, 9), (64, 5)]
    for shape, shards in zip(shapes, plan_shards(shapes, 2, 4, "shard0"), strict=True):
        for i, shard in enumerate(shards):
            assert shard == Shard.rectangle(shape, *shard_spans(shape, [Placement(0)], [4], [i]))


def test_ranges_follow_each_other() -> None:
    (shards,) = plan_shards([(5, 7)], 2, 4, "flat")
    assert [shard.flat for shard in shards] == [(0, 9), (9, 18), (18, 27), (27, 35)]
    assert all(a.flat and b.flat and a.flat[1] == b.flat[0] for a, b in pairwise(shards))


def test_costs_of_a_small_model_by_hand() -> None:
    # Two ranks get rows 0:20 and 20:40 of the first; the second has a full anchor at rank 8.
    costs = shard_costs([(40, 30), (6, 50)], 8, 2, "shard0")
    assert costs.flops == [4 * 20 * 30 * 8 + 4 * 64 * 20 + 4 * 150] * 2
    assert costs.elements == [750, 750]
    assert costs.anchor_bytes == [2 * (20 + 30) * 16 + 2 * 600 + 2 * 150] * 2
    assert costs.traffic_bytes == [8 * 600 + 2 * 2 * (20 + 30) * 16 + 12 * 150] * 2
    assert (costs.buffer_bytes, costs.sent_bytes, costs.drift_bytes) == (256, 256, [256, 256])
    assert costs.published_sent_bytes == 1500
    assert costs.published_anchor_bytes == 2 * (70 * 8 + 64) + 2 * 300
    block = shard_costs([(40, 30), (6, 50)], 8, 2, "shard0", keep_base=False)
    assert block.anchor_bytes == [2 * (20 + 30) * 16 + 256 + 2 * 150] * 2
    assert block.traffic_bytes == [6 * 600 + 2 * 2 * (20 + 30) * 16 + 12 * 150] * 2


def test_a_range_is_counted_rectangle_by_rectangle() -> None:
    # Elements 5:17 of rows of 7: the end of row 0, row 1, the beginning of row 2.
    costs = shard_costs([(5, 7)], 2, 3, "flat")
    assert costs.flops[0] == 4 * 12 * 2 + 4 * 4 * (1 + 1)
    assert costs.flops[1] == 4 * 12 * 2 + 4 * 4 * (1 + 1 + 1)
    assert costs.flops[2] == 4 * 11 * 2 + 4 * 4 * (1 + 1)


def test_one_rank_and_uncut_weights_send_nothing() -> None:
    for layout in LAYOUTS:
        costs = shard_costs(LLAMA, 768, 1, layout)
        assert costs.buffer_bytes == costs.sent_bytes == costs.published_sent_bytes == 0
    cut = sum(sum(shard.numel > 0 for shard in shards) > 1 for shards in plan_shards(LLAMA, 768, 64, "replicated"))
    costs = shard_costs(LLAMA, 768, 64, "replicated")
    assert 0 < cut < len(LLAMA)
    assert costs.buffer_bytes == cut * BLOCK and costs.sent_bytes == 2 * 63 * cut * BLOCK // 64
    assert costs.published_sent_bytes == 0
    sharded = shard_costs(LLAMA, 768, 64, "shard0")
    assert sharded.buffer_bytes == len(LLAMA) * BLOCK and sharded.drift_bytes == [len(LLAMA) * BLOCK] * 64
    assert sharded.published_sent_bytes == 63 * 2 * sum(m * n for m, n in LLAMA) // 64


def test_only_what_a_rank_works_on_is_held() -> None:
    costs = shard_costs(LLAMA, 768, 8, "replicated", keep_base=False)
    shards_by_weight = plan_shards(LLAMA, 768, 8, "replicated")
    for i in range(8):
        held = sum(shards[i].numel > 0 for shards in shards_by_weight)
        assert costs.drift_bytes[i] == held * BLOCK
        assert costs.anchor_bytes[i] == held * BLOCK + sum(
            2 * 768 * sum(shards[i].bounds.shape) for shards in shards_by_weight
        )


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("rank", [5, 16, 24])
def test_bytes_are_those_of_anchors_of_whole_weights(rank: int, keep_base: bool) -> None:
    weight = torch.randn(40, 24).bfloat16()
    shard = Shard.whole((40, 24))
    anchor = rk.Anchor.from_weight(weight, rank, keep_base=keep_base)
    assert anchor_bytes(shard, rank, keep_base) == anchor.nbytes
    wide = rk.Anchor.from_weight(weight.double() / 3, rank, keep_base=True, basis_dtype=torch.float32)
    assert anchor_bytes(shard, rank, True, basis_bytes=4, base_bytes=8) == wide.nbytes


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("rank", [5, 16, 24])
@pytest.mark.parametrize(
    "shard",
    [
        Shard.rectangle((40, 24), (8, 21), (0, 24)),
        Shard.rectangle((40, 24), (0, 40), (3, 7)),
        Shard.range((40, 24), 30, 200),
        Shard.range((40, 24), 30, 40),
        Shard.nothing((40, 24)),
    ],
    ids=["rows", "columns", "range", "range within a row", "nothing"],
)
def test_bytes_are_those_of_anchors_of_shards(shard: Shard, rank: int, keep_base: bool) -> None:
    assert anchor_bytes(shard, rank, keep_base) == anchor_of(shard, rank, keep_base).nbytes
    wide = anchor_of(shard, rank, keep_base, torch.float32)
    assert anchor_bytes(shard, rank, keep_base, basis_bytes=4) == wide.nbytes


def test_an_empty_part_keeps_nothing() -> None:
    for keep_base in (True, False):
        assert anchor_bytes(Shard.nothing((40, 24)), 5, keep_base) == 0


def test_more_ranks_than_rows_leave_some_without_work() -> None:
    costs = shard_costs([(3, 50)], 2, 5, "shard0")
    assert costs.elements == [50, 50, 50, 0, 0]
    assert costs.flops[3:] == costs.traffic_bytes[3:] == costs.anchor_bytes[3:] == [0, 0]


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"world_size": 0}, {"layout": "shard1"}])
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    arguments = {"rank": 2, "world_size": 2, "layout": "flat", **wrong}
    with pytest.raises(ValueError, match=f"rank, ranks, layout: got .*{next(iter(wrong.values()))}.*, expected"):
        plan_shards([(4, 4)], **arguments)  # type: ignore[arg-type]


def test_command_prints_every_layout_and_the_published_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "--model", "llama-3.1-8b", "--rank", "768", "--ranks", "1", "8", "64"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    numbers = [(row[0], row[1]) for row in rows if len(row) == 9 and row[0] != "layout"]
    for layout in LAYOUTS:
        for n in ("1", "8", "64"):
            at = numbers.index((layout, n))
            assert numbers[at + 1] == ("published", n)
    assert len(numbers) == 2 * 3 * len(LAYOUTS)
    costs = shard_costs(LLAMA, 768, 8, "shard0")
    (row,) = [row for row in rows if row[:2] == ["shard0", "8"]]
    assert row[2:6] == [
        f"{max(costs.flops) / 1e12:.3f}",
        f"{costs.share:.2f}x",
        f"{costs.buffer_bytes / 1e9:.3f}",
        f"{costs.sent_bytes / 1e9:.3f}",
    ]
    assert float(row[7]) == pytest.approx(max(costs.anchor_bytes) / 2**30, abs=0.005)


def test_command_prints_one_layout_and_the_block_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", "--ranks", "8", "--layout", "flat", "--block-form"]) == 0
    printed = capsys.readouterr().out
    assert "block form" in printed and "shard0" not in printed and "replicated" not in printed
    costs = shard_costs(LLAMA, 768, 8, "flat", keep_base=False)
    (row,) = [line.split() for line in printed.splitlines() if line.startswith("flat")]
    assert float(row[7]) == pytest.approx(max(costs.anchor_bytes) / 2**30, abs=0.005)


def test_command_refuses_sizes_below_one() -> None:
    with pytest.raises(SystemExit, match="--ranks: got 0, expected at least 1"):
        main(["shards", "--ranks", "4", "0"])
    with pytest.raises(SystemExit, match="--rank: got -1, expected at least 1"):
        main(["shards", "--rank", "-1"])
