"""Steps with adapted weights: dtypes, gradients that exist, second derivatives, several devices' worth of states."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import rpsft_kernels as rk
from adapted_models import adapt, anchors_of, dense_penalty, distance, gradients, llama, move, pretrained
from small_models import refused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("basis_dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype: torch.dtype, basis_dtype: torch.dtype) -> None:
    """R and gradients are those of the numbers that factors and bases hold, but for rounding."""
    model = adapt(llama()).to(dtype)
    anchors = anchors_of(model, basis_dtype=basis_dtype)
    assert rk.rotation_penalty(model, anchors).item() == 0.0
    move(model)
    penalty = rk.accumulate_rotation_grad_(model, anchors, 1.0)
    assert penalty.dtype == torch.float32
    found = gradients(model)
    assert {grad.dtype for grad in found.values()} == {dtype}
    model.zero_grad()
    model.double()
    wanted = torch.zeros((), dtype=torch.float64)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "get_base_layer"):
            anchor = anchors[name.removeprefix("base_model.model.") + ".weight"]
            drift = layer.get_delta_weight("default")
            if anchor.left is not None and anchor.right is not None:
                drift = anchor.left.double().T @ drift @ anchor.right.double()
            wanted = wanted + drift.square().sum()
    wanted.backward()
    assert penalty.item() == pytest.approx(wanted.item(), rel=1e-5)
    # A gradient is rounded once, to the dtype that it is kept in.
    assert distance(found, gradients(model)) <= (1e-5 if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_dora": True, "init_lora_weights": False}])
def test_autocast_changes_no_bit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Neither what a step computes, nor what anchors and plans keep for later ones."""
    found: list[tuple[float, dict[str, torch.Tensor]]] = []
    for enabled in (False, True):
        torch.manual_seed(1)
        model = adapt(llama(), **options).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            anchors = anchors_of(model, "now", basis_dtype=torch.float32)
            move(model)
            for _ in range(2):
                penalty = rk.accumulate_rotation_grad_(model, anchors, 1.0)
                rk.rotation_penalty(model, anchors).backward()
        found += [(penalty.item(), gradients(model))]
        found += [(rk.accumulate_rotation_grad_(model, anchors, 1.0).item(), gradients(model))]
    for (plain, wanted), (cast, grads) in zip(found[:2], found[2:], strict=True):
        assert plain == cast > 0
        assert distance(grads, wanted) == 0.0


def test_frozen_factors_get_no_gradient() -> None:
    model = adapt(llama())
    anchors = anchors_of(model)
    move(model)
    whole = rk.accumulate_rotation_grad_(model, anchors, 1.0)
    wanted = gradients(model)
    model.zero_grad()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert rk.accumulate_rotation_grad_(model, anchors, 1.0).item() == whole.item()
    found = gradients(model)
    assert found and all("lora_B" in name for name in found)
    assert distance(found, {name: wanted[name] for name in found}) == 0.0
    model.zero_grad()
    rk.rotation_penalty(model, anchors).backward()
    assert distance(gradients(model), found) <= 1e-14


def test_gradients_that_exist_are_added_to() -> None:
    model = adapt(llama(), use_dora=True)
    anchors = anchors_of(model)
    move(model)
    rk.accumulate_rotation_grad_(model, anchors, 1.0)
    wanted = {name: grad + 1 for name, grad in gradients(model).items()}
    model.zero_grad()
    held = {}
    for i, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.requires_grad:
            # Some are numbers that were expanded: these are not written into.
            one = torch.ones((), dtype=torch.float64)
            held[name] = parameter.grad = one.expand(parameter.shape) if i % 2 else torch.ones_like(parameter)
    rk.accumulate_rotation_grad_(model, anchors, 1.0)
    assert distance(gradients(model), wanted) <= 1e-14
    assert all(float(grad.max()) == 1.0 for grad in held.values() if grad.stride() == (0, 0))


@pytest.mark.parametrize("reverse", [False, True])
def test_a_factor_of_layers_with_and_without_bases(reverse: bool) -> None:
    model = adapt(llama(), ["q_proj", "k_proj"])
    for layer in model.get_base_model().model.layers:
        layer.self_attn.k_proj.lora_A["default"].weight = layer.self_attn.q_proj.lora_A["default"].weight
    start, anchors = pretrained(model), anchors_of(model)
    assert {anchor.form for anchor in anchors.values()} == {"block", "full"}
    order = reversed(list(anchors)) if reverse else anchors
    anchors = rk.Anchors({name: anchors[name] for name in order})
    move(model)
    dense_penalty(model, anchors, start).backward()
    wanted = gradients(model)
    model.zero_grad()
    rk.accumulate_rotation_grad_(model, anchors, 1.0)
    assert distance(gradients(model), wanted) < 1e-12
    rk.accumulate_rotation_grad_(model, anchors, 1.0)
    assert distance({name: grad / 2 for name, grad in gradients(model).items()}, wanted) < 1e-12
    model.zero_grad()
    rk.rotation_penalty(model, anchors).backward()
    assert distance(gradients(model), wanted) < 1e-12


def test_nothing_is_left_behind_by_a_refused_call() -> None:
    model = adapt(llama())
    anchors = anchors_of(model)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
    shared = torch.zeros(10_000, dtype=torch.float64)
    for parameter in factors[:2]:
        parameter.grad = shared[: parameter.numel()].view(parameter.shape)
    assert "shares memory with" in refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1.0))
    assert [parameter.grad is None for parameter in factors[2:]] == [True] * len(factors[2:])
    assert shared.abs().sum() == 0


@pytest.mark.parametrize("dora", [False, True])
def test_second_derivatives(dora: bool) -> None:
    model = adapt(llama(), ["q_proj"], use_dora=dora)
    start = pretrained(model)
    anchors = anchors_of(model)
    move(model)
    factors = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def curvature(penalty: torch.Tensor) -> list[torch.Tensor]:
        grads = torch.autograd.grad(penalty, factors, create_graph=True)
        return list(torch.autograd.grad(sum(grad.square().sum() for grad in grads), factors))

    from adapted_models import dense_penalty

    found, wanted = curvature(rk.rotation_penalty(model, anchors)), curvature(dense_penalty(model, anchors, start))
    for one, other in zip(found, wanted, strict=True):
        assert float((one - other).norm() / other.norm()) <= 1e-11


def test_models_and_anchors_that_the_user_drops_are_freed() -> None:
    def use() -> list[weakref.ref[Any]]:
        model = adapt(llama())
        anchors = anchors_of(model)
        rk.accumulate_rotation_grad_(model, anchors, 1.0)
        rk.rotation_penalty(model, anchors).backward()
        module = model.base_model.model.model.layers[0].self_attn.q_proj
        return [weakref.ref(one) for one in (model, anchors, next(iter(anchors.values())), module)]

    references = use()
    gc.collect()
    assert [reference() for reference in references] == [None] * 4


def test_a_plan_serves_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from rpsft_kernels.evaluation import call

    model = adapt(llama(), modules_to_save=["o_proj"])
    anchors = anchors_of(model)
    rk.accumulate_rotation_grad_(model, anchors, 1.0)
    monkeypatch.setattr(call, "find_parameters", lambda _: pytest.fail("parameters were named anew"))
    move(model)
    assert rk.accumulate_rotation_grad_(model, anchors, 1.0).item() > 0
    assert rk.rotation_penalty(model, anchors).item() > 0


@pytest.mark.parametrize("copies", [None, ["o_proj"]])
def test_gradients_of_factors_are_not_compared_with_those_of_r(copies: list[str] | None) -> None:
    model = adapt(llama(), ["q_proj"], modules_to_save=copies)
    penalty = rk.RotationPenalty(anchors=anchors_of(model))
    move(model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    assert penalty.add_gradients_(model).item() > 0
    assert "rotation/grad_ratio" not in penalty.metrics()


@pytest.mark.parametrize("dora", [False, True])
def test_factors_that_change_before_the_backward_pass_are_refused(dora: bool) -> None:
    model = adapt(llama(), use_dora=dora)
    anchors = anchors_of(model)
    move(model)
    penalty = rk.rotation_penalty(model, anchors)
    move(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        penalty.backward()


def test_a_coeff_beyond_the_dtype_of_factors_is_refused() -> None:
    model = adapt(llama()).float()
    anchors = anchors_of(model, basis_dtype=torch.float32)
    move(model)
    assert "coeff: got 1e+300" in refused(lambda: rk.accumulate_rotation_grad_(model, anchors, 1e300))
    assert not gradients(model)


def test_tangents_are_refused() -> None:
    model = adapt(llama(), ["q_proj"])
    anchors = anchors_of(model)
    tangents = {n: torch.ones_like(p) for n, p in model.named_parameters() if "lora_B" in n}
    primals = {name: model.get_parameter(name).detach() for name in tangents}

    def penalty(values: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.nn.utils.stateless._reparametrize_module(model, values):
            return rk.rotation_penalty(model, anchors)

    assert "got a tensor with a tangent" in refused(lambda: torch.func.jvp(penalty, (primals,), (tangents,)))
