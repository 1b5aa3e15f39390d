"""Times predicted from tiles and measured rates."""

from __future__ import annotations

import pytest
import torch

from rpsft_kernels.distributed.shard import Shard
from rpsft_kernels.ops.buckets import BucketLimits
from rpsft_kernels.tools.cli import main
from rpsft_kernels.tools.gpus import GPUS
from rpsft_kernels.tools.models import MODELS
from rpsft_kernels.tools.predict import COPY_RATE, COPY_SHARE, TENSOR_RATES, predict
from rpsft_kernels.tools.roofline import Job, rank_phases

H200 = GPUS["h200"]


def job(model: str, rank: int, **more: object) -> Job:
    return Job(MODELS[model].weights(), rank, H200, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "rank", "milliseconds"),
    [("llama-3.1-8b", 768, 42.0), ("llama-3.2-1b", 128, 3.5), ("qwen2.5-0.5b", 128, 2.5)],
)
def test_whole_models_within_their_limits(model: str, rank: int, milliseconds: float) -> None:
    assert 0 < predict(job(model, rank)).total <= milliseconds / 1e3


def test_no_phase_is_faster_than_the_rates_allow() -> None:
    shapes, rank = MODELS["llama-3.1-8b"].weights(), 768
    elements = sum(m * n for m, n in shapes)
    seconds = predict(job("llama-3.1-8b", rank)).seconds
    assert seconds["project"] >= 2 * elements * rank / TENSOR_RATES["hopper_project"]
    assert seconds["gradient"] >= 2 * elements * rank / TENSOR_RATES["hopper_gradient"]
    small = predict(job("llama-3.1-8b", 64)).seconds
    # W and W0, and G twice.
    assert small["project"] >= 4 * elements / COPY_RATE
    assert small["gradient"] >= 4 * elements / COPY_RATE


def test_what_costs_more_takes_longer() -> None:
    plain = predict(job("llama-3.2-1b", 384))
    assert predict(job("llama-3.2-1b", 768)).total > plain.total
    assert predict(job("llama-3.2-1b", 384, dtype=torch.float32)).total > plain.total
    few = predict(job("llama-3.2-1b", 384), BucketLimits(weights=1))
    assert few.launches > plain.launches and few.total > plain.total


def test_what_launches_beside_a_phase_move_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding C, and the sums of a vocabulary's stretches, where memory is all that takes time."""
    shape, rank = (1024, 128256), 128
    plain = {phase.name: phase.bytes for phase in rank_phases(Job([shape], rank, H200), [Shard.whole(shape)])}
    monkeypatch.setattr("rpsft_kernels.tools.predict.COPY_RATE", 1.0)
    seconds = predict(Job([shape], rank, H200)).seconds
    assert COPY_SHARE * seconds["pull"] == pytest.approx(plain["pull"] + 6 * rank**2)
    # 4 stretches of T, each in 4 stretches of rows: 16 sums of k x k in float32, written and read.
    assert COPY_SHARE * seconds["drift"] == pytest.approx(plain["drift"] + 16 * 8 * rank**2)
    assert COPY_SHARE * seconds["gradient"] == pytest.approx(plain["gradient"])


def test_full_anchors_have_a_phase_of_their_own() -> None:
    prediction = predict(Job([(64, 32)], 32, H200))
    assert set(prediction.seconds) == {"full", "launches"} and prediction.launches == 3


def test_several_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"job.world_size: got 2, expected 1"):
        predict(job("llama-3.2-1b", 128, world_size=2))


def test_the_command_prints_it_for_an_h200_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["roofline", "--model", "llama-3.1-8b", "--gpu", "h200"]) == 0
    printed = capsys.readouterr().out
    assert predict(job("llama-3.1-8b", 768)).table() in printed
    for words in (["--gpu", "h100"], ["--gpu", "h200", "--ranks", "8"]):
        assert main(["roofline", "--model", "llama-3.1-8b", *words]) == 0
        assert "rates of prototypes" not in capsys.readouterr().out
