from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

import rpsft_kernels as rk
from adapted_models import LLAMA, adapt, anchors_of, gradients, llama, move
from small_models import refused


def _merged() -> Any:
    model = adapt(llama())
    model.merge_adapter()
    return model


def _disabled() -> Any:
    model = adapt(llama())
    model.base_model.disable_adapter_layers()
    return model


def _other_tuner() -> Any:
    return get_peft_model(llama(), LoHaConfig(target_modules=LLAMA, r=2)).double()


def _trainable_base() -> Any:
    model = adapt(llama())
    next(model.base_model.model.model.layers[0].self_attn.q_proj.get_base_layer().parameters()).requires_grad_()
    return model


def _two_of_dora() -> Any:
    model = adapt(llama(), use_dora=True)
    model.add_adapter("second", LoraConfig(target_modules=LLAMA, r=2))
    model.base_model.set_adapter(["default", "second"])
    return model.double()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "merged": (_merged, "model.unmerge_adapter"),
    "disabled": (_disabled, "enable_adapter_layers"),
    "another tuner": (_other_tuner, "got loha.Linear, expected LoRA's linear layers and embeddings"),
    "two of DoRA": (_two_of_dora, "got DoRA's adapter 'default' beside others"),
    "trained tokens": (
        lambda: adapt(llama(), trainable_token_indices=[1, 2]),
        "got trainable_tokens.TrainableTokensLayer, expected LoRA's",
    ),
    "adapters of parameters": (
        lambda: adapt(llama(), ["q_proj"], target_parameters=["mlp.down_proj.weight"]),
        "target_parameters",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_are_not_served(name: str) -> None:
    make, message = REFUSED[name]
    model, plain = make(), rk.Anchors.from_model(llama().double(), 8, progress=False)
    for call in (
        lambda: anchors_of(model),
        lambda: rk.rotation_penalty(model, plain),
        lambda: rk.accumulate_rotation_grad_(model, plain, 1.0),
    ):
        found = refused(call)
        assert message in found and "model." in found
    assert gradients(model) == {}


class _Kernel(nn.Module):
    """A layer of which no parameter is called ``weight``."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.gate = nn.Parameter(torch.randn(24, 20)), nn.Parameter(torch.randn(6, 20))


def _with_linear(layer: nn.Module, **options: Any) -> Any:
    model = nn.ModuleDict({"layer": layer, "linear": nn.Linear(24, 20)})
    return get_peft_model(model, LoraConfig(**{"target_modules": ["linear"], "r": 2, **options})).double()


def _packed() -> Any:
    model = adapt(llama(), ["q_proj", "down_proj"])
    base = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    del base.weight
    base.register_buffer("qweight", torch.zeros(4, 32, dtype=torch.int32))
    return model


def _weighed_anew() -> Any:
    class XLoraLayer:
        def forward(self, x: Tensor) -> Tensor:
            return x

    model = adapt(llama())
    model.get_base_model().model.layers[0].self_attn.q_proj.forward = XLoraLayer().forward
    return model


def _around_another() -> Any:
    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj", "k_proj"], r=2), mixed=True)
    model.add_adapter("second", LoHaConfig(target_modules=["q_proj"], r=2))
    model.set_adapter(["default", "second"])
    return model.double()


# The model, the weight that is refused by name, and a glob that leaves it out.
MOVED_UNDER_ANOTHER_NAME: dict[str, tuple[Callable[[], Any], str, str]] = {
    "attention": (
        lambda: _with_linear(nn.MultiheadAttention(24, 2), target_modules=["layer", "linear"]),
        "layer.in_proj_weight: got lora.MultiheadAttention",
        "layer.in_proj_weight",
    ),
    "a parameter": (
        lambda: _with_linear(_Kernel(), target_parameters=["layer.kernel"]),
        "layer.kernel: got lora.ParamWrapper",
        "*kernel",
    ),
    "two parameters": (
        lambda: _with_linear(_Kernel(), target_parameters=["layer.kernel", "layer.gate"]),
        "got lora.ParamWrapper",
        "layer.*",
    ),
    "packed values": (_packed, "model.layers.0.self_attn.q_proj.weight: got a Linear without a parameter", "*.0.*"),
    "another adapter around it": (_around_another, "q_proj.base_layer.weight: got loha.Linear", "*q_proj*"),
    "X-LoRA": (_weighed_anew, "q_proj.weight: got lora.Linear, expected LoRA's linear layers", "*.0.*"),
}


@pytest.mark.parametrize("name", MOVED_UNDER_ANOTHER_NAME)
def test_no_weight_that_adapters_move_is_passed_over(name: str) -> None:
    make, message, pattern = MOVED_UNDER_ANOTHER_NAME[name]
    model = make()
    assert message in refused(lambda: anchors_of(model))
    anchors = anchors_of(model, exclude=pattern)
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    move(model)
    assert rk.rotation_penalty(model, anchors).item() > 0


def test_an_adapter_of_the_user_s_own_is_refused() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(8, 6)

        def get_base_layer(self) -> nn.Module:
            return self.base_layer

    Wrapper.__module__ = "__main__"
    message = refused(lambda: anchors_of(nn.Sequential(Wrapper())))
    assert message.startswith("0.weight: got Wrapper, expected LoRA's linear layers")


def test_what_is_not_served_may_be_left_out() -> None:
    model = adapt(llama(), trainable_token_indices=[1, 2])
    anchors = anchors_of(model, exclude="model.embed_tokens*")
    move(model)
    assert rk.rotation_penalty(model, anchors).item() > 0


def test_a_base_that_trains_is_refused() -> None:
    model = _trainable_base()
    assert "got a base that requires grad" in refused(lambda: rk.rotation_penalty(model, anchors_of(model)))


def _activate(model: Any, **options: Any) -> None:
    model.add_adapter("second", LoraConfig(r=2, **options))
    model.double().set_adapter("second")


def _unfreeze(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj.weight.requires_grad_()


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: _activate(model, target_modules=["q_proj", "lm_head"]), "lm_head.weight: got a weight with ada"),
        (
            lambda model: _activate(model, target_modules=["q_proj"], modules_to_save=["o_proj"]),
            "model.layers.0.self_attn.o_proj.weight: got a weight with a trained copy",
        ),
        (_unfreeze, "model.layers.0.mlp.up_proj.weight: got a weight with requires_grad, expected one that stands st"),
    ],
    ids=["adapter", "copy", "requires_grad"],
)
def test_what_moves_and_stood_still_when_anchored_is_refused(
    change: Callable[[Any], None], message: str, planned: bool
) -> None:
    model = adapt(llama(), ["q_proj"])
    anchors = anchors_of(model)
    if planned:
        rk.rotation_penalty(model, anchors)
    change(model)
    assert message in refused(lambda: rk.rotation_penalty(model, anchors))
    assert message in refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0))
    assert gradients(model) == {}
    assert rk.rotation_penalty(model, anchors_of(model)).item() == 0.0


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("changed", ["mlp.down_proj.base_layer", "mlp.up_proj"])
def test_another_base_is_refused(changed: str, keep_base: bool) -> None:
    plain = llama().double()
    anchors = rk.Anchors.from_model(plain, 8, progress=False, basis_dtype=torch.float64, keep_base=keep_base)
    model = adapt(llama())
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    base = model.get_parameter(f"base_model.model.model.layers.1.{changed}.weight")
    pretrained, other = base.data, base.data.clone()
    other[0, 0] += 1e-3
    base.data = other
    assert "with other values" in refused(lambda: rk.rotation_penalty(model, anchors)) or keep_base
    base.data = pretrained
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    with torch.no_grad():
        base[0, 0] += 1e-3
    message = refused(lambda: rk.rotation_penalty(model, anchors))
    assert message.startswith(f"model.layers.1.{changed.replace('.base_layer', '')}.weight: got a ")
    assert "adapt the pretrained model that was anchored" in message


def test_a_base_that_has_given_up_its_adapter_is_refused() -> None:
    model = adapt(llama(), init_lora_weights="pissa")
    plain = rk.Anchors.from_model(llama().double(), 8, progress=False)
    assert "init_lora_weights='pissa'" in refused(lambda: anchors_of(model))
    assert "at='now'" in refused(lambda: rk.rotation_penalty(model, plain))
    anchors = anchors_of(model, "now")
    model.add_adapter("second", LoraConfig(target_modules=LLAMA, r=2))
    model.set_adapter("second")
    assert "expected 'default' among them" in refused(lambda: rk.rotation_penalty(model.double(), anchors))
    # Nor do layers without an active adapter compute with what was anchored.
    model.add_adapter("third", LoraConfig(target_modules=["o_proj"], r=2))
    model.set_adapter("third")
    message = refused(lambda: rk.rotation_penalty(model.double(), anchors))
    assert "got active adapters (none), expected 'default' among them" in message


def test_a_part_of_a_model_that_does_not_tell_the_start_is_refused() -> None:
    model = adapt(llama(), init_lora_weights="pissa")
    part = model.get_base_model().model
    message = "got adapter 'default' with values in a part of a model"
    assert message in refused(lambda: anchors_of(part))
    anchors = anchors_of(part, "now")
    assert rk.rotation_penalty(part, anchors).item() == 0.0
    part = adapt(llama()).get_base_model().model
    assert rk.rotation_penalty(part, anchors_of(part)).item() == 0.0


def test_dtypes_and_gradients() -> None:
    model = adapt(llama())
    anchors = anchors_of(model)
    assert "got adapters in float32" in refused(lambda: rk.rotation_penalty(model.float(), anchors))
    model.double()
    factor = next(p for n, p in model.named_parameters() if "lora_B" in n)
    factor.grad = torch.zeros_like(factor).to_sparse()
    message = refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0))
    assert "lora_B.default.weight.grad: got layout torch.sparse_coo" in message
    assert [name for name, p in model.named_parameters() if p.grad is not None] == [
        next(n for n, _ in model.named_parameters() if "lora_B" in n)
    ]
    for parameter in model.parameters():
        parameter.requires_grad_(False).grad = None
    assert "every anchored parameter is frozen" in refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0))
    assert rk.rotation_penalty(model, anchors).item() == 0.0


def test_after_the_step_modes_are_refused() -> None:
    model = adapt(llama())
    penalty = rk.RotationPenalty(8, mode="project", budget=0.1)
    penalty.anchor(model)
    move(model)
    assert "use mode 'gradient'" in refused(lambda: penalty.after_step_(model, 0.1))
