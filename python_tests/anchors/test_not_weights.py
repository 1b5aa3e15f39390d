"""What is no weight of its own is left out, and says why; what only looks like it is anchored."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as hooked_spectral_norm
from torch.nn.utils import weight_norm as hooked_weight_norm

import rpsft_kernels as rk
from rpsft_kernels.anchors import not_weights
from rpsft_kernels.anchors.select import select_weights


class _Holder(nn.Module):
    """A module with parameters of the given names."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, tensor in parameters.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))


def _reasons(module: nn.Module) -> dict[str, str]:
    """The reasons for the parameters of two or more dimensions, in a model that has a weight besides."""
    model = nn.ModuleDict({"plain": nn.Linear(6, 4, bias=False), "odd": module})
    selection = select_weights(model)
    assert "plain.weight" in selection.chosen
    parameters = dict(model.named_parameters())
    return {name: reason for name, reason in selection.skipped.items() if parameters[name].ndim > 1}


def _packed(layer: nn.Module, dtype: torch.dtype, quant_state: bool) -> nn.Module:
    count = layer.weight.numel() // (2 * dtype.itemsize)  # type: ignore[union-attr, operator]
    parameter = nn.Parameter(torch.ones(count, 1, dtype=dtype), requires_grad=False)
    if quant_state:
        parameter.quant_state = SimpleNamespace(blocksize=64)  # type: ignore[attr-defined]
    layer.weight = parameter
    return layer


@pytest.mark.parametrize("quant_state", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("make", [lambda: nn.Linear(64, 32), lambda: nn.Embedding(64, 32)])
def test_packed_payloads(make: Callable[[], nn.Module], dtype: torch.dtype, quant_state: bool) -> None:
    assert _reasons(_packed(make(), dtype, quant_state)) == {"odd.weight": not_weights.PACKED}


def test_packed_payloads_of_layers_that_say_so() -> None:
    layer = _Holder(weight=torch.ones(512, 1))
    layer.quant_state = SimpleNamespace(blocksize=64)  # type: ignore[assignment]
    assert _reasons(layer) == {"odd.weight": not_weights.PACKED}
    layer = _Holder(W_q=torch.ones(16, 16))
    layer.meta = {"nbits": 4, "shape": (32, 32)}  # type: ignore[assignment]
    assert _reasons(layer) == {"odd.W_q": not_weights.PACKED}


@pytest.mark.parametrize("name", ["weight_scale_inv", "SCB", "zero_point", "weight_zero_point", "qzeros", "absmax"])
def test_scales_and_zero_points_by_name(name: str) -> None:
    assert _reasons(_Holder(**{name: torch.ones(2, 3)})) == {f"odd.{name}": not_weights.SCALE}


@pytest.mark.parametrize("name", ["scale", "scales", "weight_scale", "input_scale", "up_scales", "zeros"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int32])
def test_scales_beside_quantised_values(name: str, dtype: torch.dtype) -> None:
    values = torch.ones(4, 6).to(dtype)
    assert _reasons(_Holder(weight=values, **{name: torch.ones(2, 3)}))[f"odd.{name}"] == not_weights.SCALE
    beside = _Holder(**{name: torch.ones(2, 3)})
    beside.register_buffer("qweight", values)
    assert _reasons(beside) == {f"odd.{name}": not_weights.SCALE}


def test_weights_that_only_look_like_these_are_anchored() -> None:
    model = nn.ModuleDict(
        {
            "column": nn.Linear(1, 64),
            "row": nn.Linear(64, 1),
            "table": nn.Embedding(64, 1),
            "bare": _Holder(weight=torch.ones(64, 1), weight_v=torch.ones(4, 4), prompt_encoder=torch.ones(4, 4)),
            "gate": _Holder(scale=torch.ones(4, 4), weight=torch.ones(4, 4)),
        }
    )
    chosen = select_weights(model).chosen
    assert set(chosen) == {name for name, parameter in model.named_parameters() if parameter.ndim == 2}


class _Lora(nn.Module):
    """Laid out as PEFT's LoRA layers are."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_embedding_A", "vera_lambda")

    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Linear(6, 4)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 4, bias=False)})
        self.lora_embedding_A = nn.ParameterDict({"default": torch.ones(2, 6)})
        self.vera_lambda = nn.ParameterDict({"default": torch.ones(2, 2)})


def test_parts_of_adapters() -> None:
    assert _reasons(_Lora()) == {
        "odd.base_layer.weight": not_weights.ADAPTED,
        "odd.lora_A.default.weight": not_weights.ADAPTER,
        "odd.lora_B.default.weight": not_weights.ADAPTER,
        "odd.lora_embedding_A.default": not_weights.ADAPTER,
        "odd.vera_lambda.default": not_weights.ADAPTER,
    }
    # loralib's layers are weights that have parts themselves.
    assert _reasons(_Holder(weight=torch.ones(4, 6), lora_A=torch.ones(2, 6), lora_B=torch.ones(4, 2))) == {
        "odd.weight": not_weights.ADAPTED,
        "odd.lora_A": not_weights.ADAPTER,
        "odd.lora_B": not_weights.ADAPTER,
    }


def test_modules_to_save() -> None:
    saved = nn.ModuleDict(
        {"original_module": nn.Linear(6, 4), "modules_to_save": nn.ModuleDict({"default": nn.Linear(6, 4)})}
    )
    assert _reasons(saved) == {
        "odd.original_module.weight": not_weights.KEPT_BESIDE_A_COPY,
        "odd.modules_to_save.default.weight": not_weights.ADAPTER,
    }


def test_an_adapted_model_has_nothing_to_anchor() -> None:
    with pytest.raises(
        ValueError, match=r"no parameter to anchor \(.*1 base of an adapter \(PEFT\): the effective weight"
    ):
        rk.Anchors.from_model(nn.Sequential(_Lora()), 2, progress=False)


class _Shifted(nn.Module):
    """A parametrization with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(4, 6))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.shift


@pytest.mark.parametrize(
    ("parametrised", "names"),
    [
        (lambda layer: parametrizations.weight_norm(layer), ["original0", "original1"]),
        (lambda layer: parametrizations.spectral_norm(layer), ["original"]),
        (lambda layer: parametrize.register_parametrization(layer, "weight", _Shifted()), ["original", "0.shift"]),
    ],
    ids=["weight_norm", "spectral_norm", "shifted"],
)
def test_parametrised_weights(parametrised: Callable[[nn.Module], nn.Module], names: list[str]) -> None:
    expected = {f"odd.parametrizations.weight.{name}": not_weights.PARAMETRISED for name in names}
    assert _reasons(parametrised(nn.Linear(6, 4))) == expected
    assert "the effective weight is not a parameter" in not_weights.PARAMETRISED


@pytest.mark.parametrize(
    ("parametrised", "names"),
    [
        (lambda layer: hooked_weight_norm(layer), ["weight_g", "weight_v"]),
        (lambda layer: hooked_spectral_norm(layer), ["weight_orig"]),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), ["weight_orig"]),
    ],
    ids=["weight_norm", "spectral_norm", "pruned"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_hooks_recompute(parametrised: Callable[[nn.Module], nn.Module], names: list[str]) -> None:
    assert _reasons(parametrised(nn.Linear(6, 4))) == {f"odd.{name}": not_weights.PARAMETRISED for name in names}


def test_wrapped_models_are_read_through() -> None:
    wrapped = torch.compile(
        nn.DataParallel(nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 4)), nn.Linear(4, 6)))
    )
    selection = select_weights(wrapped)  # type: ignore[arg-type]
    assert list(selection.chosen) == ["1.weight"]
    assert selection.skipped["0.parametrizations.weight.original0"] == not_weights.PARAMETRISED


def test_other_parameters_of_a_layer_may_be_columns() -> None:
    class Gated(nn.Linear):
        def __init__(self) -> None:
            super().__init__(16, 12)
            self.gate = nn.Parameter(torch.ones(4, 1))

    assert _reasons(Gated()) == {}
