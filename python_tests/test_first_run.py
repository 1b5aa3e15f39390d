"""The lines that docs/first_run.md asks a newcomer to write run, and print what is right."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpsft_kernels as rk

PAGE = Path(__file__).parents[1] / "docs" / "first_run.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


def run(block: str, **names: Any) -> dict[str, Any]:
    names = {"torch": torch, "rk": rk} | names
    exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_a_checkpoint_in_bfloat16_is_loaded_in_float32(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    pretrained = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes)).to(torch.bfloat16)
    pretrained.save_pretrained(tmp_path)
    names = {"name": str(tmp_path), "AutoConfig": transformers.AutoConfig}
    names["AutoModelForCausalLM"] = transformers.AutoModelForCausalLM
    assert run(BLOCKS[0], **names)["model"].dtype == torch.float32
    # What the page warns of.
    assert transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path)).dtype == torch.bfloat16


def test_memory_is_counted_from_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    transformers.LlamaConfig(vocab_size=128256, num_key_value_heads=8, **sizes).save_pretrained(tmp_path)
    run(
        BLOCKS[1],
        name=str(tmp_path),
        AutoConfig=transformers.AutoConfig,
        AutoModelForCausalLM=transformers.AutoModelForCausalLM,
    )
    shown = re.search(r"it prints `(.*?)`", PAGE.read_text())
    assert shown is not None and capsys.readouterr().out == f"{shown[1]}\n"


@pytest.mark.parametrize("keep_base", [True, False])
def test_the_rotation_of_each_weight_adds_up(
    keep_base: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrained = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 40))
    tuned = nn.Sequential(nn.Linear(96, 128), nn.Linear(128, 40))
    tuned.load_state_dict(
        {name: value + 1e-3 * torch.randn_like(value) for name, value in pretrained.state_dict().items()}
    )
    anchors = rk.Anchors.from_model(pretrained, 64, keep_base=keep_base, progress=False)
    monkeypatch.setattr(rk.Anchors, "from_model", lambda *_, **__: anchors)
    run(BLOCKS[2], pretrained=pretrained, tuned=tuned)
    lines = re.findall(r"^(\S+): R (\S+), relative (\S+)$", capsys.readouterr().out, re.M)
    assert [name for name, *_ in lines] == list(anchors) == ["0.weight", "1.weight"]
    penalty = rk.RotationPenalty(anchors=anchors, coeff=0.0)
    for parameter in tuned.parameters():
        parameter.grad = torch.ones_like(parameter)
    penalty.add_gradients_(tuned)
    # A run without strength measures, and adds nothing.
    assert all((parameter.grad == 1).all() for parameter in tuned.parameters())
    R = [float(number) for _, number, _ in lines]
    energies = [number / float(relative) ** 2 for number, (_, _, relative) in zip(R, lines, strict=True)]
    assert sum(R) == pytest.approx(penalty.metrics()["rotation/R"], rel=1e-2)
    # Three digits are printed.
    assert (sum(R) / sum(energies)) ** 0.5 == pytest.approx(penalty.metrics()["rotation/relative"], rel=1e-2)
