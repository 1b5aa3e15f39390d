from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rpsft_kernels.ops.triton import device as triton_device
from rpsft_kernels.ops.triton.aot.targets import BY_TABLE, cuda_architecture
from rpsft_kernels.ops.triton.tile_table import PHASES, rank_class, tile_config, tile_table
from rpsft_kernels.tools.tune import tune, write_table


@pytest.fixture(autouse=True)
def _fresh_tables() -> None:
    tile_table.cache_clear()


@pytest.mark.parametrize("architecture", [*BY_TABLE, "interpreter"])
def test_every_table_answers_every_question(architecture: str) -> None:
    for phase in PHASES:
        for operands in ("one part", "wide", "parts", "strided"):
            for rank in (1, 32, 33, 64, 128, 129, 4096):
                config = tile_config(architecture, phase, rank_class(rank), operands)
                # A product needs 16 rows; the elementwise phase does not.
                assert config.block_m >= (8 if phase == "full" else 16)
                assert config.stages >= 1
                assert config.block_m & (config.block_m - 1) == 0


def test_a_device_takes_the_newest_table_that_is_not_newer() -> None:
    found = {capability: cuda_architecture(capability) for capability in (80, 86, 89, 90, 100, 103, 120, 121)}
    assert found == {
        80: "sm_80",
        86: "sm_86",
        89: "sm_86",
        90: "sm_90",
        100: "sm_100",
        103: "sm_100",
        120: "sm_120",
        121: "sm_120",
    }
    with pytest.raises(ValueError, match=r"compute capability 7\.5.*8\.0"):
        cuda_architecture(75)


def test_a_table_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(json.dumps(tile_table("sm_90")))
    for row in table["project"]["one part"]:
        row["stages"] = 2
    path = tmp_path / "table.json"
    write_table(table, path)
    monkeypatch.setenv("RPSFT_TILES", str(path))
    tile_table.cache_clear()
    assert tile_config("sm_90", "project", 768, "one part").stages == 2
    assert tile_config("sm_80", "project", 768, "one part").stages == 3


def test_a_table_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "missing.json"))
    with pytest.raises(ValueError, match=r"RPSFT_TILES: cannot read .*missing\.json.*tune"):
        tile_table("sm_90")


def test_a_row_that_is_not_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = json.loads(json.dumps(tile_table("sm_90")))
    for row in table["project"]["one part"]:
        del row["blocks_per_sm"]
    write_table(table, tmp_path / "table.json")
    monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "table.json"))
    tile_table.cache_clear()
    with pytest.raises(ValueError, match=r"RPSFT_TILES: got a row of phase 'project' without 'blocks_per_sm'.*tune"):
        tile_config("sm_90", "project", 768, "one part")


@pytest.mark.usefixtures("any_tiles")
def test_tuning_takes_the_fastest_shape_and_passes_over_what_fails(
    capsys: pytest.CaptureFixture[str], device: torch.device
) -> None:
    tried: list[str] = []
    shipped = tile_table(triton_device.device_profile(device).architecture)["pull"]["one part"]

    def timer(_run: object) -> float:
        # The second shape of each phase is the fastest; the third cannot run.
        tried.append("")
        turn = (len(tried) - 1) % 3
        if turn == 2:
            raise RuntimeError("out of shared memory")
        return (2.0, 1.0)[turn]

    def row(m: int) -> dict[str, int]:
        return {"block_m": m, "block_n": 32, "block_k": 32, "warps": 4, "stages": 1, "blocks_per_sm": 1}

    table = tune([(40, 48)], 16, device, [row(32), row(64)], timer)
    assert "out of shared memory" not in capsys.readouterr().err
    for phase in ("project", "drift", "pull", "gradient"):
        assert table[phase]["one part"][0]["block_m"] == 32
    assert tile_table(triton_device.device_profile(device).architecture)["pull"]["one part"] == shipped
    assert len(tried) == 12
