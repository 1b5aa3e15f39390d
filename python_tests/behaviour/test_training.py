"""The penalty inside training loops as they are: what it adds to the task's gradient is the formula's, every time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from small_models import tiny_llama
from support import exact_gradient, exact_moved, exact_penalty, random_matrix

pytestmark = pytest.mark.usefixtures("reference_arithmetic")

How = Literal["none", "autograd", "accumulate"]
HOW: tuple[How, ...] = ("autograd", "accumulate")
COEFF = 3.0
# The k and v projections of grouped queries have 16 rows: they get full anchors, as Qwen2.5's do at the paper's rank.
RANK = 16


@dataclass(frozen=True)
class Loop:
    """One way to train."""

    autocast: bool = False
    checkpointing: bool = False
    micro_batches: int = 1
    scaled: bool = False


LOOPS = {
    "plain": Loop(),
    "checkpointing": Loop(checkpointing=True),
    "autocast": Loop(autocast=True),
    "micro-batches": Loop(micro_batches=3),
    "scaler": Loop(scaled=True),
    "everything": Loop(autocast=True, checkpointing=True, micro_batches=2, scaled=True),
}


def _pretrained(layers: int = 2, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    model = tiny_llama(vocab_size=97, num_hidden_layers=layers).to(device, dtype).train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def _moved(model: Any) -> Any:
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2:
                parameter += random_matrix(*parameter.shape, scale=0.01, seed=i, device=parameter.device)
    return model


def _batches(count: int, device: torch.device | str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(97, (2, 12), generator=generator).to(device) for _ in range(count)]


@contextmanager
def _checkpointing(model: Any, loop: Loop) -> Iterator[None]:
    if not loop.checkpointing:
        yield
        return
    # Renamed within transformers 5.
    name = "activation_checkpointing" if hasattr(model, "activation_checkpointing_enable") else "gradient_checkpointing"
    getattr(model, f"{name}_enable")()
    computed: list[int] = []
    handle = model.model.layers[0].input_layernorm.register_forward_pre_hook(lambda *_: computed.append(1))
    try:
        yield
    finally:
        handle.remove()
        getattr(model, f"{name}_disable")()
    assert len(computed) == 2 * loop.micro_batches, "no layer was computed a second time in the backward pass"


def _gradients(model: Any, anchors: rk.Anchors, how: How, loop: Loop) -> dict[str, Tensor]:
    """Every gradient at the end of one optimizer step of ``loop``; the penalty is added once in it."""
    device = model.device.type
    model.zero_grad(set_to_none=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6, betas=(0.9, 0.98))
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=loop.scaled)
    batches = _batches(loop.micro_batches, model.device)
    with _checkpointing(model, loop):
        for i, tokens in enumerate(batches):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=loop.autocast):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss / len(batches)
                if how == "autograd" and i == len(batches) - 1:
                    loss = loss + COEFF * rk.rotation_penalty(model, anchors)
            scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    if how == "accumulate":
        rk.accumulate_rotation_grad_(model, anchors, COEFF)
    found = {n: p.grad.double().clone() for n, p in model.named_parameters() if p.grad is not None}
    before = [p.detach().clone() for p in model.parameters()]
    scaler.step(optimizer)
    assert any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), before, strict=True):
            parameter.copy_(old)
    return found


def _check(model: Any, anchors: rk.Anchors, how: How, loop: Loop, relative: float) -> None:
    """The penalty's part of every gradient, apart from the task's in the same loop, against float64."""
    task = _gradients(model, anchors, "none", loop)
    found = _gradients(model, anchors, how, loop)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert set(task) == set(found) == trained and anchors.keys() & trained
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert parameter.grad is None
        elif name not in anchors:
            assert torch.equal(found[name], task[name])
        else:
            exact = exact_gradient(parameter.detach(), anchors[name], 2 * COEFF)
            assert float(exact.norm()) > 0.05 * float(task[name].norm()), "too small a penalty to be missed"
            # Two numbers are added in the gradient's dtype, and may have been scaled.
            rounding = torch.finfo(parameter.dtype).eps * float(task[name].norm() + exact.norm())
            error = float((found[name] - task[name] - exact).norm())
            assert error <= relative * float(exact.norm()) + rounding, name


def _float64_gradients(model: Any, anchors: rk.Anchors, batches: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of task loss + COEFF * R with everything in float64 and R written out in plain PyTorch."""
    double = copy.deepcopy(model).double()
    double.zero_grad(set_to_none=True)
    loss = torch.stack([double(input_ids=t, labels=t, use_cache=False).loss for t in batches]).mean().double()
    parameters = dict(double.named_parameters())
    for name, anchor in anchors.items():
        weight = parameters[name]
        drift = exact_moved(weight, anchor.base)
        if anchor.left is not None and anchor.right is not None:
            drift = anchor.left.double().T @ drift @ anchor.right.double()
        loss = loss + COEFF * drift.square().sum()
    loss.backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("loop", LOOPS)
def test_loops(loop: str, how: How) -> None:
    model = _pretrained()
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    assert {anchors[name].form for name in anchors} == {"base", "full"} and len(anchors) == 15
    _check(_moved(model), anchors, how, LOOPS[loop], 1e-5)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("loop", ["plain", "checkpointing", "micro-batches", "scaler"])
def test_the_whole_gradient_is_that_of_float64(loop: str, how: How) -> None:
    model = _pretrained()
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    _moved(model)
    found = _gradients(model, anchors, how, LOOPS[loop])
    exact = _float64_gradients(model, anchors, _batches(LOOPS[loop].micro_batches))
    assert found.keys() == exact.keys()
    for name, grad in found.items():
        # transformers' norms and losses are float32 even in a float64 model.
        assert float((grad - exact[name]).norm()) <= 1e-5 * float(exact[name].norm()), name


@pytest.mark.parametrize("how", HOW)
def test_block_form(how: How) -> None:
    model = _pretrained()
    anchors = rk.Anchors.from_model(model, RANK, keep_base=False, progress=False)
    assert {anchor.form for anchor in anchors.values()} == {"block", "full"}
    _check(_moved(model), anchors, how, LOOPS["everything"], 1e-4)


@pytest.mark.parametrize("how", HOW)
def test_a_frozen_subset(how: How) -> None:
    model = _pretrained()
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    _moved(model)
    frozen = [n for n, p in model.named_parameters() if "layers.0." in n or "up_proj" in n or "input_layernorm" in n]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    assert set(frozen) & anchors.keys() and anchors.keys() - set(frozen)
    _check(model, anchors, how, LOOPS["everything"], 1e-5)
    exact = sum(float(exact_penalty(model.get_parameter(name).detach(), anchors[name])) for name in anchors)
    assert float(rk.rotation_penalty(model, anchors).detach()) == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_tied_embeddings_are_penalised_once(how: How) -> None:
    model = _pretrained()
    anchors = rk.Anchors.from_model(model, RANK, include=["lm_head.weight"], progress=False)
    assert list(anchors) == ["model.embed_tokens.weight"]
    _moved(model)
    _check(model, anchors, how, Loop(), 1e-5)
    value = rk.rotation_penalty(model, anchors)
    weight, anchor = model.lm_head.weight, anchors["model.embed_tokens.weight"]
    assert float(value.detach()) == pytest.approx(float(exact_penalty(weight.detach(), anchor)), rel=1e-5)


@pytest.mark.parametrize("how", HOW)
def test_bfloat16_weights(how: How) -> None:
    model = _pretrained(dtype=torch.bfloat16)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    _check(_moved(model), anchors, how, LOOPS["micro-batches"], 2**-8)


def test_the_scaler_scales_the_penalty_with_the_loss() -> None:
    model = _pretrained(layers=1)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    _moved(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(rk.rotation_penalty(model, anchors)).backward()
    for name, anchor in anchors.items():
        parameter = model.get_parameter(name)
        exact = exact_gradient(parameter.detach(), anchor, 2 * 1024.0)
        assert float((parameter.grad.double() - exact).norm()) <= 1e-5 * float(exact.norm())


def test_a_penalty_in_every_micro_batch_is_divided_like_the_loss() -> None:
    model = _pretrained(layers=1)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    _moved(model)
    for _ in range(4):
        (rk.rotation_penalty(model, anchors) / 4).backward()
    for name, anchor in anchors.items():
        parameter = model.get_parameter(name)
        exact = exact_gradient(parameter.detach(), anchor)
        assert float((parameter.grad.double() - exact).norm()) <= 1e-5 * float(exact.norm())


def test_the_first_step_of_training_feels_the_anchor_from_the_second_on() -> None:
    model = _pretrained(layers=1)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    task, at_anchor = (_gradients(model, anchors, how, Loop()) for how in ("none", "accumulate"))
    assert all(torch.equal(task[name], at_anchor[name]) for name in task)
    assert float(rk.rotation_penalty(model, anchors).detach()) == 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    optimizer.step()
    _check_after_a_step(model, anchors)


def _check_after_a_step(model: nn.Module, anchors: rk.Anchors) -> None:
    model.zero_grad(set_to_none=True)
    rk.accumulate_rotation_grad_(model, anchors, 1.0)
    for name, anchor in anchors.items():
        parameter = model.get_parameter(name)
        exact = exact_gradient(parameter.detach(), anchor)
        assert parameter.grad is not None and float(exact.norm()) > 0
        assert float((parameter.grad.double() - exact).norm()) <= 1e-5 * float(exact.norm())


@pytest.mark.parametrize("how", HOW)
def test_on_the_kernels(how: How, device: torch.device) -> None:
    model = _pretrained(layers=1, device=device)
    anchors = rk.Anchors.from_model(model, RANK, progress=False)
    _moved(model)
    model.model.layers[0].mlp.requires_grad_(False)
    with rk.use_backend("triton"):
        _check(model, anchors, how, LOOPS["everything"], 4 * 2**-9)
