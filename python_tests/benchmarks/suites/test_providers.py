"""Every provider computes the same gradient, as exactly as its arithmetic allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity.contract import MAX_ERROR
from benchmarks.suites.layer import Layer
from benchmarks.suites.providers import (
    BF16,
    COMPILED,
    FP16,
    FP32,
    GEMM,
    PLAIN,
    Provider,
    _no_compiler,
    ours,
    ours_name,
    providers,
)

CPU = torch.device("cpu")
# Wide, tall, square, and one whose anchor is full.
SHAPES = [(48, 96), (96, 48), (64, 64), (16, 96)]
RANK = 16
DTYPES = (torch.bfloat16, torch.float32)
NAMES = [provider.name for provider in providers(CPU, torch.bfloat16, compiling=False)]
# Errors with a drift as large as the weight, where nothing cancels: the rounding of each provider's own products.
ROUNDING = {FP16: 0.005, BF16: 0.03, FP32: 0.005, COMPILED: 0.03}


def _eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a compiler: its tracing alone."""
    compiled = torch.compile

    def eager(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        return compiled(function, **{**options, "backend": "eager"})

    monkeypatch.setattr(torch, "compile", eager)
    _no_compiler.cache_clear()


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, torch.dtype], Provider]:
    def found(name: str, dtype: torch.dtype) -> Provider:
        if name == COMPILED:
            _eagerly(monkeypatch)
        provider = next(one for one in providers(CPU, dtype, compiling=name == COMPILED) if one.name == name)
        if provider.why_not:
            pytest.skip(provider.why_not)
        return provider

    return found


def _moved_far(layer: Layer) -> Layer:
    """Weights that have nothing to do with their anchors any more."""
    with torch.no_grad():
        for weight in layer.weights:
            weight.copy_(0.02 * torch.randn(weight.shape))
    return layer


def _exact_penalty(layer: Layer) -> float:
    total = 0.0
    for i, weight in enumerate(layer.weights):
        drift = weight.detach().double() - layer.pretrained[i].double()
        if not layer.is_full[i]:
            drift = layer.lefts[i].double().T @ drift @ layer.rights[i].double()
        total += float(drift.square().sum())
    return total


def test_every_kind_is_there_and_ours_is_first() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert {PLAIN, GEMM, FP16, BF16, FP32, COMPILED} < set(NAMES)
    assert NAMES[0] == ours_name("native", "base")
    assert {provider.role for provider in providers(CPU, torch.bfloat16, compiling=False)} == {
        "ours",
        "plain",
        "gemm",
        "published",
    }
    for backend in ("native", "torch"):
        assert {ours_name(backend, form, autograd) for form in ("base", "block") for autograd in (False, True)} <= set(
            NAMES
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != GEMM])
def test_gradient_and_penalty_are_those_of_float64(
    name: str, dtype: torch.dtype, find: Callable[[str, torch.dtype], Provider]
) -> None:
    provider = find(name, dtype)
    layer = _moved_far(Layer(SHAPES, RANK, dtype, 0, CPU))
    bound = ROUNDING[name] if provider.bound is None else provider.bound
    penalty = provider(layer)()
    assert penalty is not None and float(penalty) == pytest.approx(_exact_penalty(layer), rel=0.02)
    assert layer.worst_gradient_error() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if name != GEMM])
def test_gradients_are_added(name: str, dtype: torch.dtype, find: Callable[[str, torch.dtype], Provider]) -> None:
    layer = _moved_far(Layer(SHAPES, RANK, dtype, 0, CPU))
    step = find(name, dtype)(layer)
    step()
    once = [weight.grad.clone() for weight in layer.weights if weight.grad is not None]
    held = [weight.grad for weight in layer.weights]
    step()
    for weight, before, grad in zip(layer.weights, once, held, strict=True):
        assert weight.grad is grad
        torch.testing.assert_close(weight.grad, 2 * before, rtol=0.02, atol=0.01 * float(before.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_drifts_survive_in_ours_and_in_the_plain_one_only(dtype: torch.dtype) -> None:
    layer = Layer(SHAPES, RANK, dtype, 0, CPU)
    for provider in providers(CPU, dtype, compiling=False):
        if provider.why_not or not provider.has_gradient:
            continue
        layer.clear_gradients()
        provider(layer)()
        error = layer.worst_gradient_error()
        if provider.bound is not None:
            assert error <= provider.bound, provider.name
        elif provider.name == BF16:
            assert error > 10 * MAX_ERROR["base"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ours_and_the_plain_one_are_exactly_zero_at_the_anchor(dtype: torch.dtype) -> None:
    layer = Layer(SHAPES, RANK, dtype, 0, CPU)
    found = [one for one in providers(CPU, dtype, compiling=False) if one.role in ("ours", "plain")]
    for provider in (one for one in found if not one.why_not):
        step = provider(layer)
        with layer.at_anchor():
            assert float(step()) == 0.0, provider.name  # type: ignore[arg-type]
            assert not any(bool(weight.grad.any()) for weight in layer.weights if weight.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plain_one_equals_ours(dtype: torch.dtype) -> None:
    layer = Layer(SHAPES, RANK, dtype, 0, CPU)
    found: list[list[Tensor]] = []
    names = (ours_name("torch", "base"), PLAIN)
    for provider in (one for one in providers(CPU, dtype, compiling=False) if one.name in names):
        layer.clear_gradients()
        provider(layer)()
        found.append([weight.grad.clone() for weight in layer.weights if weight.grad is not None])
    for mine, plain in zip(*found, strict=True):
        assert float((mine.float() - plain.float()).norm()) <= 2 * MAX_ERROR["base"] * float(mine.float().norm())


def test_products_alone_leave_the_gradients_alone() -> None:
    layer = Layer(SHAPES, RANK, torch.bfloat16, 0, CPU)
    gemm = next(one for one in providers(CPU, torch.bfloat16, compiling=False) if one.name == GEMM)
    assert gemm(layer)() is None
    assert not any(bool(weight.grad.any()) for weight in layer.weights if weight.grad is not None)


def test_products_alone_are_as_many_as_are_necessary(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer(SHAPES, RANK, torch.bfloat16, 0, CPU)
    step = next(one for one in providers(CPU, torch.bfloat16, compiling=False) if one.name == GEMM)(layer)
    counted = []
    multiply = torch.mm

    def counting(first: Tensor, second: Tensor, *, out: Tensor) -> Tensor:
        counted.append(2 * first.shape[0] * first.shape[1] * second.shape[1])
        return multiply(first, second, out=out)

    monkeypatch.setattr(torch, "mm", counting)
    step()
    assert sum(counted) == layer.necessary_flops


def test_a_compiler_that_does_not_work_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(torch, "compile", broken)
    _no_compiler.cache_clear()
    compiled = next(one for one in providers(CPU, torch.bfloat16) if one.name == COMPILED)
    _no_compiler.cache_clear()
    assert compiled.why_not == "torch.compile does not work here: no C++ compiler"


def test_a_backend_that_cannot_run_has_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsft_kernels.ops.native._load", lambda: (None, "it was not built"))
    reasons = {provider.name: provider.why_not for provider in ours(CPU, torch.bfloat16)}
    assert reasons[ours_name("native", "base")] == "it was not built" and not reasons[ours_name("torch", "base")]
