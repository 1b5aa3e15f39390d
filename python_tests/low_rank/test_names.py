"""One file of anchors serves the plain model, the adapted one and the merged one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import rpsft_kernels as rk
from adapted_models import RANK, adapt, anchors_of, gradients, llama, move
from small_models import refused


def _anchors(model: nn.Module, **options: Any) -> rk.Anchors:
    return rk.Anchors.from_model(model, RANK, progress=False, basis_dtype=torch.float64, **options)


def test_one_file_for_the_plain_the_adapted_and_the_merged_model(tmp_path: Path) -> None:
    plain = llama().double()
    model = adapt(copy.deepcopy(plain), modules_to_save=["o_proj"])
    of_plain = _anchors(plain)
    _anchors(plain, keep_base=False).save(tmp_path / "plain")
    anchors_of(model).save(tmp_path / "adapted")
    files = {
        "plain, block form": rk.Anchors.load(tmp_path / "plain", model),
        "plain": of_plain,
        "adapted": rk.Anchors.load(tmp_path / "adapted", plain),
    }
    # The penalty of a weight with adapters needs no W0.
    assert {anchor.form for name, anchor in files["adapted"].items() if "q_proj" in name} == {"block"}
    for anchors in files.values():
        assert rk.rotation_penalty(model, anchors).item() == 0.0
        assert rk.rotation_penalty(plain, anchors).item() == 0.0
    move(model)
    found = {name: rk.rotation_penalty(model, anchors).item() for name, anchors in files.items()}
    assert all(value == pytest.approx(found["plain"], rel=1e-12) for value in found.values()) and found["plain"] > 0.1
    merged = model.merge_and_unload()
    for anchors in files.values():
        # Merging rounds, but R of the merged weights is that of the factors.
        assert rk.rotation_penalty(merged, anchors).item() == pytest.approx(found["plain"], rel=1e-10)


def test_what_is_anchored_and_what_is_not() -> None:
    model = adapt(llama(), modules_to_save=["o_proj"])
    model.add_adapter("spare", model.peft_config["default"])
    anchors = anchors_of(model)
    layers = [f"model.layers.{i}." for i in (0, 1)]
    wanted = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "o_proj")} | {"mlp.down_proj"}
    assert set(anchors) == {f"{layer}{name}.weight" for layer in layers for name in wanted}
    reasons = anchors.skipped
    assert reasons["model.layers.0.mlp.up_proj.weight"] == "frozen, and no adapter moves it"
    assert reasons["model.layers.0.self_attn.o_proj.original_module.weight"] == "frozen, and no adapter moves it"
    assert reasons["model.layers.0.self_attn.q_proj.lora_A.default.weight"] == "part of an adapter (PEFT)"
    assert "no adapter moves it" in anchors.summary()
    own = anchors_of(model.float(), basis_dtype=torch.float32)
    assert rk.Anchors.memory(model, RANK, basis_dtype=torch.float32).per_rank == (own.nbytes,)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_counts_blocks_and_starts(dtype: torch.dtype, dora: bool) -> None:
    for at, started in (("base", False), ("now", False), ("now", True)):
        model = adapt(llama(), use_dora=dora, init_lora_weights=not started).to(dtype)
        options: dict[str, Any] = {"basis_dtype": dtype, "at": at}
        planned = rk.Anchors.memory(model, RANK, **options)
        anchors = anchors_of(model, **options)
        assert planned.per_rank == (anchors.nbytes,) and not planned.at_most
        assert {anchor.form for anchor in anchors.values()} == {"block", "full"}
        bound = rk.Anchors.memory(model.to("meta"), RANK, **options)
        assert bound.at_most == (dora or at == "now")
        assert bound.per_rank == planned.per_rank or (at == "now" and not started)
        assert bound.per_rank >= planned.per_rank
    assert "at: got 'then'" in refused(lambda: rk.Anchors.memory(model, RANK, at="then"))  # type: ignore[arg-type]


def test_adapters_of_a_model_without_a_wrapper_around_it() -> None:
    model = adapt(llama())
    bare = model.base_model.model
    anchors = anchors_of(model)
    move(model)
    assert set(anchors_of(bare)) == set(anchors)
    assert rk.rotation_penalty(bare, anchors).item() == rk.rotation_penalty(model, anchors).item() > 0


def test_a_training_that_goes_on_counts_from_the_base() -> None:
    model = adapt(llama(), modules_to_save=["o_proj"])
    anchors = anchors_of(model)
    move(model)
    penalty = rk.rotation_penalty(model, anchors).item()
    # Also of the trained copies, whose originals are there.
    assert rk.rotation_penalty(model, anchors_of(model)).item() == penalty
    now = anchors_of(model, "now")
    assert rk.rotation_penalty(
        model,
        now,
    ).item() == pytest.approx(_penalty_of_copies(model, anchors), rel=1e-12)


def _penalty_of_copies(model: Any, anchors: rk.Anchors) -> float:
    return rk.rotation_penalty(model, {name: a for name, a in anchors.items() if "o_proj" in name}).item()


@pytest.mark.parametrize("at", ["base", "now"])
def test_starts_are_kept_in_the_file(tmp_path: Path, at: str) -> None:
    model = adapt(llama(), use_dora=True, init_lora_weights=at == "base")
    anchors = anchors_of(model, at)
    anchors.save(tmp_path / "anchors")
    move(model)
    for loaded in (rk.Anchors.load(tmp_path / "anchors"), rk.Anchors.load(tmp_path / "anchors", model)):
        assert loaded.nbytes == anchors.nbytes
        assert rk.rotation_penalty(model, loaded).item() == rk.rotation_penalty(model, anchors).item() > 0
        start = loaded["model.layers.0.self_attn.q_proj.weight"].starts["default"]
        assert list(start.pieces()) == (["scale"] if at == "base" else ["up", "down", "scale"])


def test_tied_weights_of_which_one_is_adapted() -> None:
    plain = llama().double()
    of_plain = _anchors(plain)
    assert of_plain.skipped["lm_head.weight"] == "tied to model.embed_tokens.weight"
    for target in ("lm_head", "embed_tokens"):
        model = adapt(llama(), [target])
        own = anchors_of(model)
        assert len(own) == 1
        move(model)
        penalty = rk.rotation_penalty(model, own).item()
        assert rk.rotation_penalty(model, of_plain).item() == pytest.approx(penalty, rel=1e-12)
        assert penalty > 0
    both = adapt(llama(), ["lm_head", "embed_tokens"])
    assert "moves apart from model.embed_tokens.weight" in refused(lambda: rk.rotation_penalty(both, of_plain))
    assert len(anchors_of(both)) == 2


def test_adapters_that_are_switched_between_steps() -> None:
    model = adapt(llama())
    model.add_adapter("second", model.peft_config["default"])
    model.double()
    anchors = anchors_of(model)
    move(model)
    first = rk.rotation_penalty(model, anchors).item()
    model.set_adapter("second")
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    move(model)
    second = rk.accumulate_rotation_grad_(model, anchors, 1.0).item()
    assert 0 < second != first
    assert all("second" in name for name in gradients(model))
    model.set_adapter("default")
    assert rk.rotation_penalty(model, anchors).item() == first
    for _, module in model.named_modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 2.0)
    assert rk.rotation_penalty(model, anchors).item() == pytest.approx(4 * first, rel=1e-12)


def test_adapters_that_are_on_other_layers() -> None:
    model = adapt(llama(), ["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["down_proj"], r=2))
    model.double()
    # Of all layers that have adapters, whichever are active.
    anchors = anchors_of(model)
    assert len(anchors) == 4
    model.base_model.set_adapter(["default", "second"])
    move(model)
    total = rk.rotation_penalty(model, anchors).item()
    model.set_adapter("default")
    first = rk.rotation_penalty(model, anchors).item()
    model.set_adapter("second")
    second = rk.rotation_penalty(model, anchors).item()
    assert 0 < first < total and first + second == pytest.approx(total, rel=1e-12)


def test_the_base_of_adapters_that_are_off() -> None:
    plain = rk.Anchors.from_model(llama().double(), 8, progress=False, basis_dtype=torch.float64)
    model = adapt(llama(), ["q_proj"])
    model.add_adapter("second", LoraConfig(target_modules=["down_proj"], r=2))
    model.double().set_adapter("second")
    assert rk.rotation_penalty(model, plain).item() == 0.0
    # One that trains counts as any other weight does; one that has moved and stands still is not the pretrained one.
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.requires_grad_()
    assert rk.rotation_penalty(model, plain).item() == 0.0
    with torch.no_grad():
        base[0, 0] += 1e-3
    anchor = plain["model.layers.0.self_attn.q_proj.weight"]
    assert anchor.left is not None and anchor.right is not None
    moved = 1e-6 * float(anchor.left[0].square().sum() * anchor.right[0].square().sum())
    assert rk.accumulate_rotation_grad_(model, plain, 1.0).item() == pytest.approx(moved, rel=1e-6)
    assert base.grad is not None and base.grad.count_nonzero()
    base.requires_grad_(False)
    assert "q_proj.weight: got a " in refused(lambda: rk.rotation_penalty(model, plain))


def test_a_weight_that_trains_from_a_later_step_on_counts() -> None:
    plain = rk.Anchors.from_model(llama().double(), 8, progress=False, basis_dtype=torch.float64)
    model = adapt(llama(), ["q_proj"])
    assert rk.accumulate_rotation_grad_(model, plain, 1.0).item() == 0.0
    weight = model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_()
    # As the fused kernels of some optimizers write: autograd does not know of it.
    weight.data.mul_(1.01)
    anchor = plain["model.layers.0.mlp.up_proj.weight"]
    assert anchor.left is not None and anchor.right is not None
    drift = anchor.left.T @ (weight.detach() * (0.01 / 1.01)) @ anchor.right
    penalty = rk.accumulate_rotation_grad_(model, plain, 1.0)
    assert penalty.item() == pytest.approx(drift.square().sum().item(), rel=1e-9)
    assert weight.grad is not None and weight.grad.count_nonzero()
    # Frozen again it would count 0.
    weight.requires_grad_(False)
    assert "up_proj.weight: got a base at a distance of 0.01" in refused(lambda: rk.rotation_penalty(model, plain))


def test_one_layer_under_two_names_counts_once() -> None:
    def share(model: Any) -> Any:
        first, second = model.get_submodule("model.layers").children()
        second.self_attn.q_proj = first.self_attn.q_proj
        return model

    plain = _anchors(share(llama().double()), include="*.q_proj.weight")
    model = adapt(llama(), ["q_proj"])
    untied = anchors_of(model)
    share(model.get_base_model())
    anchors = anchors_of(model)
    move(model)
    assert list(anchors) == list(plain) == ["model.layers.0.self_attn.q_proj.weight"]
    penalty = rk.accumulate_rotation_grad_(model, anchors, 1.0).item()
    assert penalty == pytest.approx(rk.rotation_penalty(model, plain).item(), rel=1e-12)
    (layer,) = {module for module in model.modules() if hasattr(module, "get_delta_weight")}
    anchor = anchors["model.layers.0.self_attn.q_proj.weight"]
    assert anchor.left is not None and anchor.right is not None
    drift = anchor.left.T @ layer.get_delta_weight("default") @ anchor.right
    assert penalty == pytest.approx(drift.square().sum().item(), rel=1e-12)
    assert "anchored as two" in refused(lambda: rk.rotation_penalty(model, untied))


def test_trained_copies_that_are_switched() -> None:
    model = adapt(llama(), ["q_proj"], modules_to_save=["o_proj"])
    model.add_adapter("second", model.peft_config["default"])
    model.double()
    anchors = anchors_of(model)
    copies = {name: a for name, a in anchors.items() if "o_proj" in name}
    move(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    moved = rk.rotation_penalty(model, anchors).item()
    model.set_adapter("second", inference_mode=True)
    assert rk.rotation_penalty(model, anchors).item() == 0.0 < moved
    model.set_adapter("default", inference_mode=True)
    assert rk.rotation_penalty(model, anchors).item() == moved
    assert rk.rotation_penalty(model, copies).item() < moved
