"""Bases that bitsandbytes holds in 4 and 8 bits: W0 is what they stand for, and steps do not read them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from adapted_models import LLAMA, RANK, distance, gradients, layers, llama, move
from rpsft_kernels.low_rank import QuantisedWeight

bitsandbytes = pytest.importorskip("bitsandbytes")


def _quantise(weight: Tensor, bits: int) -> nn.Module:
    rows, columns = weight.shape
    if bits == 4:
        layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(weight.detach(), requires_grad=False, quant_type="nf4")
    else:
        layer = bitsandbytes.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
        layer.weight = bitsandbytes.nn.Int8Params(weight.detach(), requires_grad=False, has_fp16_weights=False)
    quantised: nn.Module = layer.to("cpu")
    return quantised


def _model(bits: int) -> Any:
    from peft import LoraConfig, get_peft_model

    model = llama()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name.endswith("_proj"):
                setattr(module, name, _quantise(child.weight, bits))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(target_modules=LLAMA, r=4))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(bits)
    anchors = rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float32)
    assert len(anchors) == 6 and anchors["model.layers.0.mlp.down_proj.weight"].shape == (32, 44)
    anchors.verify(model)
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    move(model)
    total = torch.zeros((), dtype=torch.float64)
    for name, module in layers(model):
        anchor, delta = anchors[name], module.get_delta_weight("default").double()
        if anchor.left is not None and anchor.right is not None:
            delta = anchor.left.double().T @ delta @ anchor.right.double()
        total = total + delta.square().sum()
    total.backward()
    wanted = gradients(model)
    model.zero_grad()
    # Steps do not read what is below.
    monkeypatch.setattr(QuantisedWeight, "values", lambda self: pytest.fail("a step has read a base"))
    assert rk.accumulate_rotation_grad_(model, anchors, 1.0).item() == pytest.approx(total.item(), rel=1e-5)
    assert distance(gradients(model), wanted) <= 1e-5
    monkeypatch.undo()
    anchors.save(tmp_path / "anchors")
    loaded = rk.Anchors.load(tmp_path / "anchors", model)
    assert rk.rotation_penalty(model, loaded).item() == pytest.approx(total.item(), rel=1e-5)
    # Anchors of the model before it was quantised have other U and V, and serve all the same.
    of_plain = rk.Anchors.from_model(llama(), RANK, progress=False, basis_dtype=torch.float32)
    assert rk.rotation_penalty(model, of_plain).item() == pytest.approx(total.item(), rel=0.1)


def test_another_quantised_base_is_refused() -> None:
    plain = llama()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    anchors = rk.Anchors.from_model(plain, RANK, progress=False)
    with pytest.raises(ValueError, match=r"got a base at a distance of 1.* \|\|W0\|\|"):
        rk.rotation_penalty(_model(4), anchors)
