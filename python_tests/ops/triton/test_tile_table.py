from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rpsft_kernels.ops.triton.aot.targets import BY_TABLE, cuda_architecture
from rpsft_kernels.ops.triton.tile_table import PHASES, forget_tuned, rank_class, tile_config, tile_table
from rpsft_kernels.tools.tune import write_table


@pytest.fixture(autouse=True)
def _fresh_tables() -> Iterator[None]:
    forget_tuned()
    yield
    # The tests after these must not be planned by the tables of these.
    forget_tuned()


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


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("sm_80", {"specialised": True}, r"specialised row of phase 'project' for sm_80, expected one for sm_90"),
        (
            "sm_90",
            {"narrow": {"block_n": 128, "block_k": 32}},
            r"narrow tiles of phase 'project' with block_k",
        ),
    ],
)
def test_rows_that_must_not_be_used(
    architecture: str, change: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = json.loads(json.dumps(tile_table(architecture)))
    for row in table["project"]["one part"]:
        row.update(change)
    write_table(table, tmp_path / "table.json")
    monkeypatch.setenv("RPSFT_TILES", str(tmp_path / "table.json"))
    tile_table.cache_clear()
    with pytest.raises(ValueError, match=message):
        tile_config(architecture, "project", 768, "one part", narrow=True)
