from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from rpsft_kernels.costs import step_flops
from rpsft_kernels.distributed.partition import LAYOUTS, Layout, plan_shards
from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.tools.cli import main
from rpsft_kernels.tools.gpus import GPUS, Gpu
from rpsft_kernels.tools.models import MODELS
from rpsft_kernels.tools.roofline import (
    DRAM_SHARE,
    LAUNCH_SECONDS,
    LINK_SHARE,
    TENSOR_SHARE,
    Job,
    Phase,
    our_phases,
    phase_table,
    published_phases,
    rank_launches,
    rank_phases,
    total_seconds,
)
from rpsft_kernels.tools.schedule import schedule_report
from rpsft_kernels.tools.shards import shard_costs

LLAMA = MODELS["llama-3.1-8b"].weights()
H100 = GPUS["h100"]
OURS = ["project", "drift", "exchange", "pull", "gradient", "full"]
PUBLISHED = ["gather", "cast", "project", "drift", "pull", "gradient", "cast back", "add", "full", "host"]


def by_name(phases: list[Phase]) -> dict[str, Phase]:
    return {phase.name: phase for phase in phases}


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("rank", [64, 768])
def test_flops_of_all_phases_are_those_of_the_model(model: str, rank: int) -> None:
    shapes = MODELS[model].weights()
    _, phases = our_phases(Job(shapes, rank, H100))
    assert sum(phase.flops for phase in phases) == sum(step_flops(shape, rank) for shape in shapes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_divide_the_flops_as_their_costs_say(layout: Layout, ranks: int) -> None:
    shapes = MODELS["qwen2.5-0.5b"].weights()
    job = Job(shapes, 256, H100, ranks, layout)
    rows, costs = plan_shards(shapes, 256, ranks, layout), shard_costs(shapes, 256, ranks, layout)
    phases = [rank_phases(job, [row[i] for row in rows]) for i in range(ranks)]
    assert [sum(phase.flops for phase in mine) for mine in phases] == costs.flops
    busiest, ours = our_phases(job)
    assert sum(phase.flops for phase in ours) == costs.flops[busiest]
    assert by_name(ours)["exchange"].sent == costs.sent_bytes
    assert total_seconds(phases[busiest], H100) == max(total_seconds(mine, H100) for mine in phases)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_one_weight_by_hand(shape: tuple[int, int]) -> None:
    # k = 8. W and W0 are 1280 bytes each; the bases 256 and 640, T and P 256, C 256.
    phases = by_name(rank_phases(Job([shape], 8, H100), [Shard.whole(shape)]))
    assert {name: phase.bytes for name, phase in phases.items()} == {
        "project": 1280 + 1280 + 640 + 256,
        "drift": 256 + 256 + 256,
        "pull": 256 + 256 + 256,
        "gradient": 256 + 640 + 2 * 1280,
        "full": 0,
    }
    assert [phase.flops for phase in phases.values()] == [10240, 2048, 2048, 10240, 0]


def test_block_form_and_float32_by_hand() -> None:
    # W is 2560 bytes, T three parts of 256; B is read beside C; weights in three parts take three products.
    job = Job([(16, 40)], 8, H100, keep_base=False, dtype=torch.float32)
    phases = by_name(rank_phases(job, [Shard.whole((16, 40))]))
    assert phases["project"].bytes == 2560 + 640 + 3 * 256
    assert phases["drift"].bytes == 3 * 256 + 256 + 2 * 256
    assert phases["pull"].bytes == 3 * 256
    assert phases["gradient"].bytes == 256 + 640 + 2 * 2560
    assert [phases[name].flops for name in ("project", "drift", "pull", "gradient")] == [30720, 6144, 2048, 10240]
    # With bfloat16 weights T alone is in parts.
    half = by_name(rank_phases(replace(job, dtype=torch.bfloat16), [Shard.whole((16, 40))]))
    assert (half["project"].flops, half["drift"].flops) == (10240, 6144)


def test_full_anchors_have_a_row_of_their_own() -> None:
    phases = by_name(rank_phases(Job([(16, 40)], 16, H100), [Shard.whole((16, 40))]))
    assert phases["full"].bytes == 6 * 1280 and phases["full"].flops == 4 * 640
    assert sum(phase.bytes for phase in phases.values()) == 6 * 1280
    _, ours = our_phases(Job([(16, 40), (32, 40)], 16, H100))
    assert by_name(ours)["full"].launches == 3 and by_name(ours)["project"].launches == 1


def test_a_range_pays_for_the_sums_of_its_rectangles() -> None:
    # The end of row 0, rows 1 to 3, the beginning of row 4: three C of 16 bytes, two additions of 48.
    shard = Shard.range((6, 10), 5, 45)
    assert [rect.shape for rect in shard.rects] == [(1, 5), (3, 10), (1, 5)]
    phases = by_name(rank_phases(Job([(6, 10)], 2, H100), [shard]))
    assert phases["drift"].bytes == 2 * (4 + 12 + 4) + 3 * 16 + 2 * 48
    assert phases["project"].bytes == 4 * 40 + 4 * (5 + 10 + 5) + 4 * (1 + 3 + 1)


def test_a_phase_lasts_as_long_as_the_resource_it_needs_longest() -> None:
    gpu = Gpu("paper", "sm_90", 132, tensor=100.0 / TENSOR_SHARE, dram=10.0 / DRAM_SHARE, link=1.0 / LINK_SHARE)
    phase = Phase("any", flops=400, bytes=30, sent=2, launches=1, launch_seconds=1.0)
    assert phase.times(gpu) == pytest.approx({"tensor cores": 4.0, "memory": 3.0, "network": 2.0, "launches": 1.0})
    seen = []
    for changed in (phase, replace(phase, bytes=50), replace(phase, sent=6), replace(phase, launch_seconds=7.0)):
        assert changed.seconds(gpu) == max(changed.times(gpu).values())
        seen.append((round(changed.seconds(gpu), 6), changed.bound(gpu)))
    assert seen == [(4.0, "tensor cores"), (5.0, "memory"), (6.0, "network"), (7.0, "launches")]
    assert Phase("nothing").bound(gpu) == "-"
    assert total_seconds([phase, replace(phase, sent=6)], gpu) == pytest.approx(10.0)


@pytest.mark.parametrize("keep_base", [True, False])
def test_launches_are_those_of_the_schedule(keep_base: bool) -> None:
    # At rank 128 sums of C are split; at 768 they are not.
    for rank in (128, 768):
        _, ours = our_phases(Job(LLAMA, rank, H100, keep_base=keep_base))
        report = schedule_report(LLAMA, rank, keep_base=keep_base)
        assert sum(phase.launches for phase in ours) == report.launches
        assert by_name(ours)["project"].launches == by_name(ours)["gradient"].launches == report.buckets
        assert all(phase.launch_seconds == phase.launches * LAUNCH_SECONDS for phase in ours)


def test_a_rank_launches_nothing_for_what_it_has_not() -> None:
    job = Job([(256, 512)] * 3, 64, H100, 2)
    nothing = rank_launches(job, [Shard.nothing((256, 512))] * 3)
    assert nothing["project"] == nothing["gradient"] == 0 and nothing["exchange"] == 4
    assert not rank_launches(job, [Shard.nothing((32, 512))] * 3)["full"]
    half = rank_launches(job, [Shard.rectangle((256, 512), (0, 128), (0, 512))] * 3)
    # On 9.0 C is rounded before it is pulled.
    assert half["project"] == half["gradient"] == 1 and half["pull"] == 2


def test_the_published_way_by_hand() -> None:
    # Pieces in float16, k = 8: U 256, V, T and its gradient 640, C 128, W 1280; W and .grad 2560 in float32.
    phases = by_name(published_phases(Job([(16, 40)], 8, H100, dtype=torch.float32)))
    assert phases["cast"].bytes == phases["cast back"].bytes == 2560 + 1280
    assert phases["project"].bytes == phases["gradient"].bytes == 1280 + 256 + 640
    assert phases["drift"].bytes == 640 + 640 + 7 * 128
    assert phases["add"].bytes == 3 * 2560
    assert sum(phase.flops for phase in phases.values()) == 4 * 16 * 40 * 8 + 4 * 64 * 40


def test_the_published_way_waits_for_what_its_host_cannot_hide() -> None:
    small = published_phases(Job([(64, 64)] * 100, 8, H100))
    operators = sum(phase.launches for phase in small)
    assert operators == 1500
    assert total_seconds(small, H100) == pytest.approx(operators * 8e-6)
    assert by_name(published_phases(Job(LLAMA, 768, H100)))["host"].seconds(H100) == 0


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_published_way_is_never_predicted_faster(gpu: Gpu, dtype: torch.dtype) -> None:
    for ranks, layout in ((1, "shard0"), (8, "shard0"), (8, "replicated"), (8, "flat")):
        job = Job(LLAMA, 768, gpu, ranks, layout, dtype=dtype)  # type: ignore[arg-type]
        assert total_seconds(published_phases(job), gpu) > total_seconds(our_phases(job)[1], gpu)


def test_every_rank_does_everything_in_the_published_way() -> None:
    one, eight = (by_name(published_phases(Job(LLAMA, 768, H100, n, "shard0"))) for n in (1, 8))
    assert one["gather"].sent == 0
    assert eight["gather"].sent == shard_costs(LLAMA, 768, 8, "shard0").published_sent_bytes
    assert [eight[name].flops for name in PUBLISHED] == [one[name].flops for name in PUBLISHED]


def test_table_ends_in_the_sum() -> None:
    _, ours = our_phases(Job(LLAMA, 768, H100, 8))
    rows = [line.split() for line in phase_table(ours, H100).splitlines()]
    assert [row[0] for row in rows[1:]] == [*OURS, "sum"]
    assert float(rows[-1][5]) == pytest.approx(1e3 * total_seconds(ours, H100), abs=1e-3)
    assert float(rows[-1][5]) == pytest.approx(sum(float(row[5]) for row in rows[1:-1]), abs=0.01)
    assert rows[3][:4] == ["exchange", "0.000", "4.532", "0.933"] and rows[3][6] == "network"


@pytest.mark.parametrize("name", list(GPUS))
def test_command_prints_both_ways_and_what_they_assume(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "qwen2.5-0.5b", "--rank", "256", "--ranks", "2", "--layout", "flat"]
    assert main(["roofline", "--gpu", name, *arguments]) == 0
    printed = capsys.readouterr().out
    head, ours, published, ratio = printed.rstrip().split("\n\n")
    gpu = GPUS[name]
    for word in (name, f"{gpu.tensor / 1e12:g} TFLOP/s", f"{gpu.dram / 1e12:g} TB/s", f"{gpu.link / 1e9:g} GB/s"):
        assert word in head
    for constant in ("75% of the tensor cores'", "85% of DRAM", "75% of the link", "5 us a launch", "8 us of the host"):
        assert constant in head
    assert all("prediction" in block for block in (head, ours, published)) and "predicted" in ratio
    assert "this package" in ours and "published way" in published
    for block, names in ((ours, OURS), (published, PUBLISHED)):
        found = [re.split(r"\s{2,}", line)[0] for line in block.splitlines()[2:]]
        assert found == [*names, "sum"]
    sums = [float(block.splitlines()[-1].split()[5]) for block in (ours, published)]
    # The sums are printed to a microsecond, the ratio to a hundredth.
    rounding = 0.005 + sums[1] / sums[0] * (0.0005 / sums[0] + 0.0005 / sums[1])
    assert float(ratio.split()[-1]) == pytest.approx(sums[1] / sums[0], abs=rounding)


def test_command_knows_the_block_form_and_float32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--model", "smollm2-135m", "--rank", "128", "--block-form", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "block form, float32 weights, 1 x h100" in printed
    shapes = MODELS["smollm2-135m"].weights()
    _, ours = our_phases(Job(shapes, 128, H100, keep_base=False, dtype=torch.float32))
    assert phase_table(ours, H100) in printed


def test_command_refuses_what_it_does_not_know() -> None:
    with pytest.raises(SystemExit, match="--gpu: got 'v100', expected one of a100, h100, h200, b200, mi300x"):
        main(["roofline", "--gpu", "v100"])
    with pytest.raises(SystemExit, match="--ranks: got 0, expected at least 1"):
        main(["roofline", "--ranks", "0"])
    with pytest.raises(SystemExit, match="--rank: got -1, expected at least 1"):
        main(["roofline", "--rank", "-1"])
