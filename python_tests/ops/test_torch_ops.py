"""The torch operators: opcheck, derivatives, fake tensors, ``torch.compile``, and modes of torch."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import rpsft_kernels as rk
from rpsft_kernels import ops
from support import (
    DTYPES,
    FORMS,
    Form,
    accumulation,
    exact_drift,
    exact_gradient,
    exact_penalty,
    exact_pull,
    make_problem,
    operands_of,
    random_matrix,
    relative_error,
)

SHAPES = [(7, 5), (5, 8), (4, 4)]
OPERATORS = torch.ops.rpsft_kernels


def _problems(form: Form, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> list[Any]:
    # Finite differences need a drift as large as the weight.
    return [
        make_problem(form, shape, 3, dtype, basis_dtype=torch.float32, drift=1.0, seed=seed, device=device)
        for seed, shape in enumerate(SHAPES)
    ]


def _arguments(form: Form, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> tuple[Any, ...]:
    arguments = operands_of(_problems(form, dtype, device))
    for weight in arguments[0]:
        weight.requires_grad_()
    return arguments


def _pull_arguments(
    form: Form, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]:
    """Arguments of ``pull_back`` up to the scales, differentiable where it is."""
    weights, lefts, rights, pretrained, _ = operands_of(_problems(form, dtype, device))
    rank = 3 if lefts else 0
    drifts = [
        random_matrix(rank, rank, accumulation(dtype), seed=seed, device=device).requires_grad_() for seed in range(3)
    ]
    scales = torch.tensor([0.5, -2.0, 3.0], dtype=accumulation(dtype), device=device, requires_grad=True)
    if lefts:
        return [], lefts, rights, [], drifts, scales
    return [weight.requires_grad_() for weight in weights], [], [], pretrained, drifts, scales


# -- opcheck ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_opcheck_of_the_projection(form: Form) -> None:
    torch.library.opcheck(OPERATORS.project_drift.default, (*_arguments(form), "torch"))


@pytest.mark.parametrize("form", ["base", "full"])
def test_opcheck_of_the_adjoint(form: Form) -> None:
    arguments = _pull_arguments(form)
    torch.library.opcheck(OPERATORS.pull_back.default, (*arguments, torch.float32, "torch"))


@pytest.mark.parametrize("accumulate", [True, False])
@pytest.mark.parametrize("form", ["base", "full"])
def test_opcheck_of_the_adjoint_in_place(form: Form, accumulate: bool) -> None:
    arguments = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in _pull_arguments(form)]
    grads = [torch.ones(shape, dtype=torch.float64) for shape in SHAPES]
    torch.library.opcheck(OPERATORS.pull_back_.default, (grads, *arguments, accumulate, "torch"))


def test_opcheck_on_the_kernels(device: torch.device) -> None:
    torch.library.opcheck(OPERATORS.project_drift.default, (*_arguments("base", torch.float32, device), "triton"))
    pull = _pull_arguments("base", torch.float32, device)
    torch.library.opcheck(OPERATORS.pull_back.default, (*pull, torch.float32, "triton"))
    plain = [[t.detach() for t in a] if isinstance(a, list) else a.detach() for a in pull]
    grads = [torch.ones(shape, device=device) for shape in SHAPES]
    torch.library.opcheck(OPERATORS.pull_back_.default, (grads, *plain, True, "triton"))


# -- derivatives -----------------------------------------------------------------------------------------------


def _projection(form: Form) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    weights, *pieces = _arguments(form)

    def function(*weights: Tensor) -> tuple[Tensor, ...]:
        drifts, squares = ops.project_drift(ops.Operands(weights, *pieces), "torch")
        # Full anchors have no drift: nothing that could be differentiated.
        return (squares,) if form == "full" else (*drifts, squares)

    return function, weights


def _adjoint(form: Form) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    weights, lefts, rights, pretrained, drifts, scales = _pull_arguments(form)
    moving = drifts if lefts else weights

    def function(scales: Tensor, *moving: Tensor) -> tuple[Tensor, ...]:
        operands = ops.Operands([] if lefts else moving, lefts, rights, pretrained)
        return tuple(ops.pull_back(operands, moving if lefts else drifts, scales, torch.float64, "torch"))

    return function, [scales, *moving]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_projection(form: Form) -> None:
    function, inputs = _projection(form)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("form", ["base", "full"])
def test_gradients_of_the_adjoint(form: Form) -> None:
    function, inputs = _adjoint(form)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_each_is_the_others_adjoint() -> None:
    # <project(W), D> = <W, pull_back(D)> for the linear (bare) form.
    weights, lefts, rights, _, _ = operands_of(_problems("bare"))
    directions = [random_matrix(3, 3, torch.float64, seed=20 + i) for i in range(3)]
    drifts, _ = ops.project_drift(ops.Operands(weights, lefts, rights), "torch")
    ones = torch.ones(3, dtype=torch.float64)
    pulled = ops.pull_back(ops.Operands(lefts=lefts, rights=rights), directions, ones, torch.float64, "torch")
    for weight, drift, grad, direction in zip(weights, drifts, pulled, directions, strict=True):
        product = float((drift * direction).sum())
        assert product == pytest.approx(float((weight * grad).sum()), rel=1e-12) and product


@pytest.mark.parametrize("form", FORMS)
def test_only_squares(form: Form) -> None:
    problems = _problems(form)
    weights, *pieces = operands_of(problems)
    for weight in weights:
        weight.requires_grad_()
    _, squares = ops.project_drift(ops.Operands(weights, *pieces), "torch")
    factors = torch.tensor([1.0, 0.0, -3.0], dtype=torch.float64)
    squares.backward(factors)
    for weight, problem, factor in zip(weights, problems, factors.tolist(), strict=True):
        assert weight.grad is not None
        assert relative_error(weight.grad, factor * exact_gradient(weight.detach(), problem)) < 1e-12


@pytest.mark.parametrize("with_squares", [True, False])
@pytest.mark.parametrize("form", ["base", "block", "bare"])
def test_only_some_drifts(form: Form, with_squares: bool) -> None:
    problems = _problems(form)
    weights, *pieces = operands_of(problems)
    for weight in weights:
        weight.requires_grad_()
    drifts, squares = ops.project_drift(ops.Operands(weights, *pieces), "torch")
    direction = random_matrix(3, 3, torch.float64, seed=30)
    loss = (drifts[1] * direction).sum() + (squares.sum() if with_squares else 0)
    loss.backward()
    for i, (weight, problem) in enumerate(zip(weights, problems, strict=True)):
        assert problem.left is not None and problem.right is not None and weight.grad is not None
        exact = torch.zeros_like(weight)
        if with_squares:
            exact = exact + exact_gradient(weight.detach(), problem)
        if i == 1:
            exact = exact + exact_pull(direction, problem.left, problem.right)
        assert relative_error(weight.grad, exact) < 1e-12


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 2), (1, 2)])
def test_frozen_members(form: Form, frozen: tuple[int, ...]) -> None:
    problems = _problems(form)
    weights, *pieces = operands_of(problems)
    for i, weight in enumerate(weights):
        weight.requires_grad_(i not in frozen)
    drifts, squares = ops.project_drift(ops.Operands(weights, *pieces), "torch")
    factors = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    ((squares * factors).sum() + sum(drift.sum() for drift in drifts)).backward()
    for i, (weight, problem) in enumerate(zip(weights, problems, strict=True)):
        if i in frozen:
            assert weight.grad is None
            continue
        exact = factors[i] * exact_gradient(weight.detach(), problem)
        if problem.left is not None and problem.right is not None:
            exact = exact + exact_pull(torch.ones(3, 3), problem.left, problem.right)
        assert weight.grad is not None and relative_error(weight.grad, exact) < 1e-12


def test_nothing_to_differentiate() -> None:
    weights, *pieces = operands_of(_problems("base"))
    drifts, squares = ops.project_drift(ops.Operands(weights, *pieces), "torch")
    assert not squares.requires_grad and not any(drift.requires_grad for drift in drifts)


def test_anchors_get_no_gradient() -> None:
    operands = ops.Operands(*_arguments("base"))
    operands.lefts[0].requires_grad_()
    _, squares = ops.project_drift(operands, "torch")
    squares.sum().backward()
    assert operands.weights[0].grad is not None and operands.lefts[0].grad is None


@pytest.mark.parametrize("form", ["base", "block", "full"])
def test_backward_keeps_no_weight_alive_that_it_does_not_read(form: Form) -> None:
    # An optimizer that steps between forward and backward is an error only where the gradient would be another's.
    weights, *pieces = _arguments(form)
    _, squares = ops.project_drift(ops.Operands(weights, *pieces), "torch")
    with torch.no_grad():
        weights[0].add_(1.0)
    if form == "full":
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            squares.sum().backward()
    else:
        squares.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_have_the_dtype_of_the_weight(form: Form, dtype: torch.dtype) -> None:
    problems = _problems(form, dtype)
    weights, *pieces = operands_of(problems)
    for weight in weights:
        weight.requires_grad_()
    ops.project_drift(ops.Operands(weights, *pieces), "torch")[1].sum().backward()
    for weight, problem in zip(weights, problems, strict=True):
        assert weight.grad is not None and weight.grad.dtype == dtype
        exact = exact_gradient(weight.detach(), problem)
        assert relative_error(weight.grad, exact) < max(torch.finfo(dtype).eps, 1e-6)


# -- fake tensors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["torch", "triton", "native"])
def test_shapes_of_fake_tensors(form: Form, dtype: torch.dtype, backend: str) -> None:
    with FakeTensorMode() as mode:
        operands = ops.Operands(
            *([mode.from_tensor(t) for t in field] for field in operands_of(_problems(form, dtype)))
        )
        drifts, squares = ops.project_drift(operands, backend)
        rank = 0 if form == "full" else 3
        assert [tuple(drift.shape) for drift in drifts] == [(rank, rank)] * 3 and tuple(squares.shape) == (3,)
        assert {t.dtype for t in (*drifts, squares)} == {accumulation(dtype)}
        operands = operands._replace(blocks=[])
        for grad_dtype in DTYPES:
            grads = ops.pull_back(operands, drifts, squares, grad_dtype, backend)
            assert [tuple(grad.shape) for grad in grads] == SHAPES
            assert {grad.dtype for grad in grads} == {grad_dtype}
            assert ops.pull_back_(grads, operands, drifts, squares, True, backend) is None


def test_real_and_fake_tensors_agree() -> None:
    for form, dtype in itertools.product(FORMS, (torch.bfloat16, torch.float64)):
        arguments = operands_of(_problems(form, dtype))
        real, real_squares = ops.project_drift(arguments, "torch")
        with FakeTensorMode() as mode:
            fake, fake_squares = ops.project_drift(
                ops.Operands(*([mode.from_tensor(t) for t in a] for a in arguments)), "torch"
            )
        for tensor, stand_in in zip([*real, real_squares], [*fake, fake_squares], strict=True):
            assert tensor.shape == stand_in.shape and tensor.dtype == stand_in.dtype
            assert tensor.stride() == stand_in.stride()


# -- torch.compile ---------------------------------------------------------------------------------------------


def _move(weight: Tensor, seed: int) -> Tensor:
    return (weight + random_matrix(*weight.shape, scale=0.01, seed=seed)).requires_grad_()


def _make_anchors(keep_base: bool) -> tuple[list[Tensor], list[rk.Anchor]]:
    pretrained = [random_matrix(*shape, seed=i) for i, shape in enumerate([(20, 12), (12, 20), (4, 20), (20, 12)])]
    # Rank 4 is the full rank of the third weight, which gets a full anchor.
    anchors = [rk.Anchor.from_weight(weight, 4, keep_base=keep_base) for weight in pretrained]
    return [_move(weight, 10 + i) for i, weight in enumerate(pretrained)], anchors


def _compare_with_eager(function: Callable[[], Tensor], weights: list[Tensor], compiler: str = "aot_eager") -> None:
    def run(run_function: Callable[[], Tensor]) -> list[Tensor]:
        for weight in weights:
            weight.grad = None
        value = run_function()
        value.backward()
        again = run_function()  # with gradients present: another trace
        again.backward()
        assert torch.equal(value, again)
        return [value.detach(), *(weight.grad for weight in weights if weight.grad is not None)]

    torch.compiler.reset()
    eager, compiled = run(function), run(torch.compile(function, fullgraph=True, backend=compiler))
    assert len(eager) == len(compiled) == 1 + len(weights) and bool(eager[0])
    for expected, actual in zip(eager, compiled, strict=True):
        if compiler == "inductor":
            # It fuses the sum over the weights, and older versions add it up in another order.
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)
        else:
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("keep_base", [True, False])
def test_compiled_penalty_of_one_tensor(keep_base: bool) -> None:
    weights, anchors = _make_anchors(keep_base)
    for weight, anchor in zip(weights[1:3], anchors[1:3], strict=True):
        _compare_with_eager(lambda w=weight, a=anchor: 3 * rk.rotation_penalty(w, a), [weight])


@pytest.mark.parametrize("keep_base", [True, False])
def test_compiled_penalty_of_a_list(keep_base: bool) -> None:
    weights, anchors = _make_anchors(keep_base)
    _compare_with_eager(lambda: 3 * rk.rotation_penalty(weights, anchors), weights)


def _model() -> nn.Module:
    model = nn.Sequential(
        nn.Embedding(9, 8), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8, bias=False), nn.Linear(8, 9)
    )
    model[4].weight = model[0].weight
    return model


@pytest.mark.parametrize("keep_base", [True, False])
def test_compiled_penalty_of_a_module(keep_base: bool) -> None:
    model = _model()
    anchors = rk.Anchors.from_model(model, 3, keep_base=keep_base, progress=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    tokens = torch.tensor([[1, 2, 8]])
    _compare_with_eager(
        lambda: model(tokens).square().mean() + 3 * rk.rotation_penalty(model, anchors), list(model.parameters())
    )


@pytest.mark.parametrize("with_base", [True, False])
def test_compiled_projection(with_base: bool) -> None:
    problem = make_problem("base" if with_base else "bare", (20, 12), 4)
    assert problem.left is not None and problem.right is not None
    left, right, base = problem.left, problem.right, problem.base
    weight = problem.weight.requires_grad_()
    _compare_with_eager(lambda: rk.project(weight, left, right, base).square().sum(), [weight])


def test_compiled_by_inductor() -> None:
    weights, anchors = _make_anchors(True)
    _compare_with_eager(lambda: rk.rotation_penalty(weights, anchors), weights, "inductor")


def test_a_compiled_function_keeps_the_backend_of_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rpsft_kernels.ops.native.unavailable", lambda device, dtype: "spoilt for this test")
    weights, anchors = _make_anchors(True)
    torch.compiler.reset()
    compiled = torch.compile(lambda: rk.rotation_penalty(weights, anchors), fullgraph=True, backend="eager")
    with rk.use_backend("torch"):
        value = compiled()
    with rk.use_backend("native"):
        assert torch.equal(compiled(), value)
        torch.compiler.reset()
        with pytest.raises(Exception, match="backend 'native' cannot serve float32 weights"):
            compiled()


# -- modes -----------------------------------------------------------------------------------------------------


def _value_and_gradients(backend: str, form: Form, device: torch.device) -> list[Tensor]:
    weights, *pieces = operands_of(_problems(form, torch.float32, device))
    for weight in weights:
        weight.requires_grad_()
    drifts, squares = ops.project_drift(ops.Operands(weights, *pieces), backend)
    loss = squares.sum() + sum(drift.sum() for drift in drifts)
    gradients = torch.autograd.grad(loss, weights, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in gradients), weights)
    return [*drifts, squares, *gradients, *second]


@pytest.mark.parametrize("form", FORMS)
def test_autocast_changes_no_bit(form: Form, device: torch.device) -> None:
    plain = _value_and_gradients("torch", form, device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(device.type, dtype=dtype):
            assert (torch.ones(2, 2, device=device) @ torch.ones(2, 2, device=device)).dtype == dtype
            inside = _value_and_gradients("torch", form, device)
        assert all(torch.equal(expected, actual) for expected, actual in zip(plain, inside, strict=True))


def test_autocast_changes_no_bit_of_the_kernels(device: torch.device) -> None:
    plain = _value_and_gradients("triton", "base", device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = _value_and_gradients("triton", "base", device)
    assert all(torch.equal(expected, actual) for expected, actual in zip(plain, inside, strict=True))


def test_autocast_changes_no_bit_of_the_public_functions() -> None:
    weights, anchors = _make_anchors(True)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for weight in weights:
                weight.grad = None
            value = rk.rotation_penalty(weights, anchors)
            accumulated = rk.accumulate_rotation_grad_(weights, anchors, 0.3)
            assert value.dtype == torch.float32 and torch.equal(value.detach(), accumulated)
            anchor = rk.Anchor.from_weight(weights[0], 3, keep_base=False)
            assert anchor.block is not None and anchor.left is not None and anchor.right is not None
            projected = rk.project(weights[0], anchor.left, anchor.right)
            grads.append([value, projected, anchor.block, *(weight.grad for weight in weights)])
    for plain, inside in zip(*grads, strict=True):
        assert plain is not None and inside is not None and torch.equal(plain, inside)


@pytest.mark.usefixtures("reference_arithmetic")
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("keep_base", [True, False])
def test_no_graph_outside_of_grad_mode(mode: Callable[[], Any], keep_base: bool) -> None:
    weights, anchors = _make_anchors(keep_base)
    with mode():
        value = rk.rotation_penalty(weights, anchors)
        left, right = anchors[0].left, anchors[0].right
        assert left is not None and right is not None
        drift = rk.project(weights[0], left, right, anchors[0].base)
    assert not value.requires_grad and not drift.requires_grad
    assert value.is_inference() == drift.is_inference() == (mode is torch.inference_mode)
    exact = sum(float(exact_penalty(w.detach(), a)) for w, a in zip(weights, anchors, strict=True))
    assert float(value) == pytest.approx(exact, rel=1e-5)
    if keep_base:
        assert relative_error(drift, exact_drift(weights[0].detach(), anchors[0])) < 1e-5
    assert torch.equal(rk.rotation_penalty(weights, anchors).detach(), value)


@pytest.mark.usefixtures("reference_arithmetic")
def test_gradients_are_accumulated_without_grad_mode_too() -> None:
    weights, anchors = _make_anchors(True)
    with torch.no_grad():
        rk.accumulate_rotation_grad_(weights, anchors, 0.5)
    for weight, anchor in zip(weights, anchors, strict=True):
        assert weight.grad is not None and not weight.grad.requires_grad
        assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor, 1.0)) < 1e-5
