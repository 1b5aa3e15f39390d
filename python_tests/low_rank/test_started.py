"""The weights that adapters make with their bases at the start: what fingerprints are taken of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rpsft_kernels as rk
from adapted_models import adapt, gpt2, layers, llama
from rpsft_kernels.anchors.adapted import locate_pretrained


def _started(transposed: bool, dora: bool = False) -> Any:
    options: dict[str, Any] = {"r": 8, "init_lora_weights": False, "use_dora": dora}
    if transposed:
        return adapt(gpt2(), ["c_attn", "wte"], fan_in_fan_out=True, **options).float()
    return adapt(llama(), **options).float()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_made_weight_is_rounded_once(transposed: bool, dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of a few rows.
    monkeypatch.setattr("rpsft_kernels.low_rank.started._CPU_ELEMENTS", 200)
    model = _started(transposed, dora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.25)
    anchors = rk.Anchors.from_model(model, 8, progress=False, at="now")
    made = locate_pretrained(model, anchors, anchors)
    for name, module in layers(model):
        start = anchors[name].starts["default"]
        assert start.up is not None and start.down is not None
        base = module.get_base_layer().weight.detach().double()
        rows = (base.T if transposed else base) + start.scaling * (start.up.double() @ start.down.double())
        if dora:
            assert start.scale is not None
            rows = rows * start.scale.double()[:, None]
        exact = rows.T if transposed else rows
        assert bool(((made[name].values().double() - exact).abs() <= 2.0**-24 * 1.001 * exact.abs()).all())


def test_anchors_fit_where_products_are_summed_in_another_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another device, or with another library: the values that are verified are not those of a library."""
    model = _started(False)
    anchors = rk.Anchors.from_model(model, 8, progress=False, at="now")
    anchors.save(tmp_path / "anchors")
    addmm_ = Tensor.addmm_

    def backwards(self: Tensor, a: Tensor, b: Tensor, **options: Any) -> Tensor:
        return addmm_(self, a.flip(1), b.flip(0), **options)

    monkeypatch.setattr(Tensor, "addmm_", backwards)
    assert rk.rotation_penalty(model, rk.Anchors.load(tmp_path / "anchors")).item() == 0.0
    rk.Anchors.load(tmp_path / "anchors", model)
    with torch.no_grad():
        next(layers(model))[1].get_base_layer().weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="got a float32 base with other values"):
        rk.rotation_penalty(model, rk.Anchors.load(tmp_path / "anchors"))
