from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from bad_weights import BAD_WEIGHTS
from support import (
    DTYPES,
    Layout,
    exact_drift,
    exact_gradient,
    exact_penalty,
    exact_pull,
    laid_out,
    make_problem,
    orthonormal,
    random_matrix,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("reference_arithmetic")

BACKENDS = ["torch", "triton"]
ANCHOR_FORMS = ["base", "block", "full"]
SHAPES = [(40, 24), (24, 40), (33, 20), (5, 3)]


def anchored(
    shape: tuple[int, int],
    form: str,
    dtype: torch.dtype = torch.float32,
    *,
    layout: Layout = "contiguous",
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, rk.Anchor]:
    """Make a leaf that has moved from its anchor by a few percent, and the anchor."""
    pretrained = random_matrix(*shape, dtype, scale=0.2, seed=seed, device=device)
    rank = min(shape) if form == "full" else 3
    anchor = rk.Anchor.from_weight(pretrained, rank, keep_base=form != "block")
    # The smallest weight gets a full anchor in any case: its rank reaches min(m, n).
    assert anchor.form == form or min(shape) <= 3
    step = random_matrix(*shape, torch.float64, scale=0.01, seed=seed + 1, device=device)
    weight = laid_out((pretrained.double() + step).to(dtype), layout)
    return weight.requires_grad_(), anchor


def several(
    form: str, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[rk.Anchor]]:
    pairs = [anchored(shape, form, dtype, seed=10 * i, device=device) for i, shape in enumerate(SHAPES)]
    return [weight for weight, _ in pairs], [anchor for _, anchor in pairs]


class Model(nn.Module):
    """A tied embedding, a frozen projection, a tall and a wide one, biases and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(21, 12)
        self.up = nn.Linear(12, 30)
        self.frozen = nn.Linear(30, 30, bias=False)
        self.down = nn.Linear(30, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 21, bias=False)
        self.head.weight = self.embed.weight
        self.frozen.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.down(torch.tanh(self.frozen(self.up(self.embed(tokens)))))))


def moved_model(device: torch.device | str, keep_base: bool = True) -> tuple[Model, rk.Anchors]:
    model = Model().to(device)
    anchors = rk.Anchors.from_model(model, 5, keep_base=keep_base, progress=False)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2:
                parameter += random_matrix(*parameter.shape, scale=0.02, seed=50 + i, device=device)
    return model, anchors


def tolerance(backend: str, form: str, dtype: torch.dtype = torch.float32) -> float:
    """Bound on the relative error of a gradient and of R.

    The kernels round W - W0, T, C and P to bfloat16, by up to 2^-9 each, and plain PyTorch does so on a GPU. On the CPU
    it sums in float32, of which a block form cancels most digits.
    """
    if form != "full" and (backend == "triton" or torch.cuda.is_available()):
        bound = 4 * 2**-9
    else:
        bound = 1e-4 if form == "block" else 2e-6
    return bound + torch.finfo(dtype).eps


def total_of(weights: Iterable[Tensor], anchors: Iterable[rk.Anchor]) -> float:
    return sum(float(exact_penalty(w.detach(), a)) for w, a in zip(weights, anchors, strict=True))


# -- values and gradients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", ANCHOR_FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_tensor(backend: str, form: str, dtype: torch.dtype, device: torch.device) -> None:
    with rk.use_backend(backend):
        for shape in SHAPES[:2]:
            weight, anchor = anchored(shape, form, dtype, device=device)
            value = rk.rotation_penalty(weight, anchor)
            assert value.dtype == torch.float32 and value.shape == () and value.device == weight.device
            (3 * value).backward()
            bound = tolerance(backend, form, dtype)
            assert abs(float(value.detach()) / total_of([weight], [anchor]) - 1) < bound
            assert weight.grad is not None and weight.grad.dtype == dtype
            assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor, 6.0)) < bound


@pytest.mark.parametrize("form", ANCHOR_FORMS)
def test_one_tensor_in_float64(form: str) -> None:
    weight, anchor = anchored((40, 24), form, torch.float64)
    value = rk.rotation_penalty(weight, anchor)
    value.backward()
    assert value.dtype == torch.float64 and weight.grad is not None
    assert abs(float(value.detach()) / total_of([weight], [anchor]) - 1) < 1e-12
    assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor)) < 1e-12


@pytest.mark.parametrize("form", ANCHOR_FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list(backend: str, form: str, device: torch.device) -> None:
    with rk.use_backend(backend):
        weights, anchors = several(form, device)
        value = rk.rotation_penalty(weights, anchors)
        value.backward()
    bound = tolerance(backend, form)
    assert abs(float(value.detach()) / total_of(weights, anchors) - 1) < bound
    for weight, anchor in zip(weights, anchors, strict=True):
        assert weight.grad is not None
        assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor)) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_list_of_every_form_and_dtype(backend: str, device: torch.device) -> None:
    kinds = [
        ("base", torch.float32, "transposed"),
        ("full", torch.bfloat16, "contiguous"),
        ("block", torch.bfloat16, "sliced"),
        ("base", torch.bfloat16, "padded"),
        ("full", torch.float32, "sliced"),
        ("block", torch.float32, "contiguous"),
        ("base", torch.float32, "padded"),
    ]
    with rk.use_backend(backend):
        pairs = [
            anchored((33, 20), form, dtype, layout=layout, seed=10 * i, device=device)
            for i, (form, dtype, layout) in enumerate(kinds)
        ]
        weights, anchors = tuple(w for w, _ in pairs), tuple(a for _, a in pairs)
        value = rk.rotation_penalty(weights, anchors)
        value.backward()
    assert abs(float(value.detach()) / total_of(weights, anchors) - 1) < tolerance(backend, "base")
    for (form, dtype, _), weight, anchor in zip(kinds, weights, anchors, strict=True):
        assert weight.grad is not None
        bound = tolerance(backend, form, dtype)
        assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor)) < bound


def test_a_list_of_float32_and_float64() -> None:
    pairs = [anchored((20, 12), "base", dtype, seed=i) for i, dtype in enumerate((torch.float32, torch.float64))]
    value = rk.rotation_penalty([w for w, _ in pairs], [a for _, a in pairs])
    assert value.dtype == torch.float64
    assert abs(float(value.detach()) / total_of(*zip(*pairs, strict=True)) - 1) < 1e-6


def test_an_empty_list_is_zero() -> None:
    for value in (rk.rotation_penalty([], []), rk.accumulate_rotation_grad_([], [], 1.0)):
        assert value.item() == 0.0 and value.dtype == torch.float32 and not value.requires_grad


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_module(backend: str, keep_base: bool, device: torch.device) -> None:
    form = "base" if keep_base else "block"
    with rk.use_backend(backend):
        model, anchors = moved_model(device, keep_base)
        assert list(anchors) == ["embed.weight", "up.weight", "frozen.weight", "down.weight"]
        value = rk.rotation_penalty(model, anchors)
        value.backward()
    parameters = dict(model.named_parameters())
    bound = tolerance(backend, form)
    # The frozen weight counts towards R, the tied one once.
    exact = total_of([parameters[name] for name in anchors], anchors.values())
    assert abs(float(value.detach()) / exact - 1) < bound
    for name, parameter in parameters.items():
        if name not in anchors or name == "frozen.weight":
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        assert relative_error(parameter.grad, exact_gradient(parameter.detach(), anchors[name])) < bound


def test_a_wrapped_module_and_a_plain_mapping(device: torch.device) -> None:
    # DataParallel moves the model to a GPU where there is one.
    model, anchors = moved_model(device)
    value = rk.rotation_penalty(model, anchors)
    assert torch.equal(rk.rotation_penalty(torch.compile(model, backend="eager"), anchors), value)  # type: ignore[arg-type]
    assert torch.equal(rk.rotation_penalty(nn.DataParallel(model), dict(anchors)), value)
    some = {name: anchors[name] for name in ("up.weight", "down.weight")}
    exact = sum(float(exact_penalty(dict(model.named_parameters())[name].detach(), some[name])) for name in some)
    assert abs(float(rk.rotation_penalty(model, some).detach()) / exact - 1) < tolerance("torch", "base")


def test_gradients_reach_what_a_weight_is_made_of() -> None:
    # The weight of a merged low-rank adapter is no leaf; torch must not warn about its .grad.
    pretrained = random_matrix(20, 12, scale=0.2)
    anchor = rk.Anchor.from_weight(pretrained, 3)
    up, down = (random_matrix(*s, scale=0.1, seed=4).requires_grad_() for s in ((20, 2), (2, 12)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight = pretrained + up @ down
        rk.rotation_penalty(weight, anchor).backward()
    exact = exact_gradient(weight.detach(), anchor)
    assert up.grad is not None and down.grad is not None
    assert relative_error(up.grad, exact @ down.detach().double().T) < 1e-5
    assert relative_error(down.grad, up.detach().double().T @ exact) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ANCHOR_FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exactly_zero_at_the_anchor(backend: str, form: str, dtype: torch.dtype, device: torch.device) -> None:
    with rk.use_backend(backend):
        weights, anchors = [], []
        for i, shape in enumerate(SHAPES):
            weight, anchor = anchored(shape, form, dtype, seed=i, device=device)
            weights.append(random_matrix(*shape, dtype, scale=0.2, seed=i, device=device).requires_grad_())
            anchors.append(anchor)
            assert not torch.equal(weights[-1], weight)
        value = rk.rotation_penalty(weights, anchors)
        value.backward()
        assert value.item() == 0.0
        assert rk.accumulate_rotation_grad_(weights, anchors, 7.0).item() == 0.0
    for weight in weights:
        assert weight.grad is not None and not weight.grad.any()


# -- accumulate_rotation_grad_ -----------------------------------------------------------------------------


def _with_existing(weights: list[Tensor], existing: str) -> list[Tensor | None]:
    """Give the weights the gradients that ``existing`` asks for; returns copies."""
    for i, weight in enumerate(weights):
        if existing == "all" or (existing == "some" and i % 2):
            weight.grad = random_matrix(*weight.shape, weight.dtype, scale=0.1, seed=70 + i, device=weight.device)
    return [None if weight.grad is None else weight.grad.clone() for weight in weights]


@pytest.mark.parametrize("existing", ["none", "all", "some"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("form", ANCHOR_FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_is_the_gradient(
    backend: str, form: str, dtype: torch.dtype, existing: str, device: torch.device
) -> None:
    with rk.use_backend(backend):
        weights, anchors = several(form, device, dtype)
        penalty = rk.rotation_penalty(weights, anchors)
        by_autograd = torch.autograd.grad(0.7 * penalty, weights)
        before = _with_existing(weights, existing)
        pointers = [None if weight.grad is None else weight.grad.data_ptr() for weight in weights]
        value = rk.accumulate_rotation_grad_(weights, anchors, 0.7)
    assert torch.equal(value, penalty.detach()) and not value.requires_grad
    bound = tolerance(backend, form, dtype)
    for weight, anchor, old, pointer, grad in zip(weights, anchors, before, pointers, by_autograd, strict=True):
        assert weight.grad is not None and weight.grad.dtype == dtype
        exact = exact_gradient(weight.detach(), anchor, 1.4)
        if old is None:
            assert relative_error(weight.grad, exact) < bound
            assert relative_error(weight.grad, grad.double()) < 4 * torch.finfo(dtype).eps
        else:
            assert weight.grad.data_ptr() == pointer
            total = old.double() + exact
            error = float((weight.grad.double() - total).norm())
            assert error < bound * float(exact.norm()) + torch.finfo(dtype).eps / 2 * float(total.norm())
            assert relative_error(weight.grad, (old + grad).double()) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("existing", ["none", "some"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_in_a_module(backend: str, existing: str, device: torch.device) -> None:
    with rk.use_backend(backend):
        model, anchors = moved_model(device)
        parameters = {name: p for name, p in model.named_parameters() if name in anchors and p.requires_grad}
        before = dict(zip(parameters, _with_existing(list(parameters.values()), existing), strict=True))
        value = rk.accumulate_rotation_grad_(model, anchors, -2)
        assert torch.equal(value, rk.rotation_penalty(model, anchors).detach())
    for name, parameter in model.named_parameters():
        if name not in parameters:
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        old, exact = before[name], exact_gradient(parameter.detach(), anchors[name], -4.0)
        added = parameter.grad if old is None else parameter.grad.double() - old.double()
        assert relative_error(added, exact) < tolerance(backend, "base") + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_calls_give_the_same_bits(backend: str, device: torch.device) -> None:
    # Sums in two orders agree by luck for many inputs, and which ones depends on the processor: hence many inputs.
    with rk.use_backend(backend):
        for seed in range(3 if backend == "triton" and device.type == "cpu" else 25):
            torch.manual_seed(seed)
            model, anchors = moved_model(device)
            before = rk.rotation_penalty(model, anchors).detach()
            model.get_parameter("up.weight").grad = torch.zeros_like(model.get_parameter("up.weight"))
            assert torch.equal(rk.accumulate_rotation_grad_(model, anchors, 0.5), before)
            model.get_parameter("down.weight").requires_grad_(False)
            assert torch.equal(rk.accumulate_rotation_grad_(model, anchors, 0.5), before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_accumulated_twice(backend: str, device: torch.device) -> None:
    weight, anchor = anchored((33, 20), "base", device=device)
    with rk.use_backend(backend):
        rk.accumulate_rotation_grad_(weight, anchor, 0.5)
        once = weight.grad.clone() if weight.grad is not None else None
        rk.accumulate_rotation_grad_(weight, anchor, 0.5)
    assert once is not None and weight.grad is not None and bool(once.any())
    torch.testing.assert_close(weight.grad, 2 * once, rtol=1e-6, atol=0)


@pytest.mark.parametrize("existing", ["none", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_listed_twice_counts_twice(backend: str, existing: str, device: torch.device) -> None:
    weight, anchor = anchored((24, 40), "base", device=device)
    with rk.use_backend(backend):
        (twice,) = torch.autograd.grad(rk.rotation_penalty([weight, weight], [anchor, anchor]), weight)
        (old,) = _with_existing([weight], existing)
        value = rk.accumulate_rotation_grad_([weight, weight], [anchor, anchor], 1.0)
        assert float(value) == pytest.approx(2 * float(rk.rotation_penalty(weight, anchor).detach()), rel=1e-6)
    assert weight.grad is not None
    expected = twice if old is None else old + twice
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_names_in_one_mapping_count_twice(backend: str, device: torch.device) -> None:
    model, anchors = moved_model(device)
    both = {"embed.weight": anchors["embed.weight"], "head.weight": anchors["embed.weight"]}
    with rk.use_backend(backend):
        (twice,) = torch.autograd.grad(rk.rotation_penalty(model, both), model.embed.weight)
        rk.accumulate_rotation_grad_(model, both, 1.0)
    assert model.embed.weight.grad is not None
    torch.testing.assert_close(model.embed.weight.grad, twice, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="in this torch a gradient is always of its weight's dtype"
)
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_wider_than_their_weights(backend: str, existing: bool, device: torch.device) -> None:
    weight, anchor = anchored((24, 40), "base", torch.bfloat16, device=device)
    weight.grad_dtype = torch.float32
    if existing:
        weight.grad = torch.ones(24, 40, device=device)
    with rk.use_backend(backend):
        rk.accumulate_rotation_grad_(weight, anchor, 0.5)
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    exact = exact_gradient(weight.detach(), anchor, 1.0)
    # No rounding to bfloat16 beyond the kernels' own.
    bound = tolerance(backend, "base")
    assert float((weight.grad.double() - int(existing) - exact).norm()) < bound * float(exact.norm()) + 1e-6 * 31


@pytest.mark.parametrize("layout", ["transposed", "padded", "sliced"])
def test_a_new_gradient_of_a_strided_weight(layout: Layout) -> None:
    weight, anchor = anchored((33, 20), "base", layout=layout)
    rk.accumulate_rotation_grad_(weight, anchor, 0.5)
    assert weight.grad is not None
    assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor, 1.0)) < 2e-6


@pytest.mark.parametrize(
    "coeff",
    [0, 0.0, -1.5, 3, True + 1, Fraction(1, 4), torch.tensor(0.25), torch.tensor(3), np.float32(0.25)],
)
def test_any_finite_coefficient(coeff: Any) -> None:
    weight, anchor = anchored((20, 12), "base")
    value = rk.accumulate_rotation_grad_(weight, anchor, coeff)
    assert float(value) == pytest.approx(total_of([weight], [anchor]), rel=1e-5)
    assert weight.grad is not None
    assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor, 2.0 * float(coeff))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_inputs_same_bits(backend: str, device: torch.device) -> None:
    weights, anchors = several("base", device)
    with rk.use_backend(backend):
        runs = []
        for _ in range(2):
            for weight in weights:
                weight.grad = None
            value = rk.accumulate_rotation_grad_(weights, anchors, 0.3)
            runs.append([value, *(weight.grad for weight in weights)])
    for one, other in zip(*runs, strict=True):
        assert one is not None and other is not None and torch.equal(one, other)


# -- project -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_project(dtype: torch.dtype, with_base: bool) -> None:
    problem = make_problem("base" if with_base else "bare", (33, 20), 4, dtype, drift=0.5)
    assert problem.left is not None and problem.right is not None
    weight = problem.weight.requires_grad_()
    drift = rk.project(weight, problem.left, problem.right, problem.base)
    assert drift.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and drift.shape == (4, 4)
    assert relative_error(drift.detach(), exact_drift(weight.detach(), problem)) < 1e-6
    given = random_matrix(4, 4, drift.dtype, seed=8)
    drift.backward(given)
    assert weight.grad is not None and weight.grad.dtype == dtype
    exact = exact_pull(given, problem.left, problem.right)
    assert relative_error(weight.grad, exact) < max(torch.finfo(dtype).eps, 1e-6)


@pytest.mark.parametrize("basis_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", [None, *DTYPES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_project_with_any_basis_and_base(
    backend: str, dtype: torch.dtype, base_dtype: torch.dtype | None, basis_dtype: torch.dtype, device: torch.device
) -> None:
    form = "bare" if base_dtype is None else "base"
    problem = make_problem(form, (20, 12), 4, dtype, basis_dtype=basis_dtype, base_dtype=base_dtype, device=device)
    assert problem.left is not None and problem.right is not None
    with rk.use_backend(backend):
        drift = rk.project(problem.weight, problem.left, problem.right, problem.base)
    exact = exact_drift(problem.weight, problem)
    assert relative_error(drift, exact) < (tolerance(backend, "base") if base_dtype else 1e-5)


def _project_arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "weight": torch.ones(6, 4),
        "left": torch.ones(6, 2),
        "right": torch.ones(4, 2),
        "base": torch.ones(6, 4),
    }
    return {**given, **changes}


@pytest.mark.parametrize("name", ["weight", "left", "right", "base"])
@pytest.mark.parametrize(("piece", "message"), BAD_WEIGHTS[1:])
def test_project_refuses_what_is_no_matrix(name: str, piece: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: {message}"):
        rk.project(**_project_arguments(**{name: piece}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": torch.ones(5, 2)}, r"left: got shape \(5, 2\), expected \(6, 2\) for a weight of shape \(6, 4\)"),
        ({"left": torch.ones(2, 6)}, r"left: got shape \(2, 6\), expected \(6, 6\)"),
        ({"right": torch.ones(4, 3)}, r"right: got shape \(4, 3\), expected \(4, 2\)"),
        ({"base": torch.ones(4, 6)}, r"base: got shape \(4, 6\), expected \(6, 4\)"),
        ({"left": torch.ones(6, 2).requires_grad_()}, r"left: got a tensor that requires grad, .*pass left\.detach"),
        ({"right": torch.ones(4, 2).requires_grad_()}, r"right: got a tensor that requires grad, .*pass right\.detach"),
        ({"base": torch.ones(6, 4).requires_grad_()}, r"base: got a tensor that requires grad, .*pass base\.detach"),
    ],
)
def test_project_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="^" + message):
        rk.project(**_project_arguments(**changes))


class _Elsewhere(torch.Tensor):
    """A tensor that says that it is on another device."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda:1")


def _elsewhere(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(_Elsewhere)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["left", "right", "base"])
def test_project_refuses_pieces_of_another_device(name: str) -> None:
    arguments = _project_arguments()
    arguments[name] = _elsewhere(arguments[name])
    with pytest.raises(
        ValueError, match=rf"^{name}: got a tensor on cuda:1, expected the weight's device cpu; move it"
    ):
        rk.project(**arguments)


def test_subspaces_need_not_be_orthonormal() -> None:
    # The projection is linear algebra that does not use U^T U = 1.
    left, right = random_matrix(20, 3), orthonormal(12, 3, torch.float32)
    weight = random_matrix(20, 12, seed=5)
    exact = left.double().T @ weight.double() @ right.double()
    assert relative_error(rk.project(weight, left, right), exact) < 1e-6


# -- errors ------------------------------------------------------------------------------------------------

Call = Callable[[Any, Any], object]
CALLS: list[Call] = [rk.rotation_penalty, lambda weights, anchors: rk.accumulate_rotation_grad_(weights, anchors, 1.0)]


def _snapshot(tensors: Iterable[Any]) -> list[Any]:
    def bits(tensor: Tensor) -> Tensor:
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        return dense.clone()

    dense = [t for t in tensors if isinstance(t, Tensor) and t.device.type == "cpu"]
    return [(bits(t), None if not t.is_leaf or t.grad is None else (id(t.grad), bits(t.grad))) for t in dense]


def refused(message: str, call: Call, weights: Any, anchors: Any) -> None:
    """``call`` raises, and no weight and no gradient has changed."""
    if isinstance(weights, nn.Module):
        tensors = list(weights.parameters())
    else:
        tensors = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    before = _snapshot(tensors)
    with pytest.raises(ValueError, match="^" + message):
        call(weights, anchors)
    for one, other in zip(before, _snapshot(tensors), strict=True):
        assert torch.equal(one[0], other[0])
        if one[1] is None or other[1] is None:
            assert one[1] is other[1] is None
        else:
            assert one[1][0] == other[1][0] and torch.equal(one[1][1], other[1][1])


@pytest.fixture
def pairs() -> tuple[list[Tensor], list[rk.Anchor]]:
    weights, anchors = several("base", "cpu")
    weights[1].grad = torch.ones_like(weights[1])
    return weights, anchors


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("weight", "message"), BAD_WEIGHTS[2:])
def test_bad_weights(call: Call, weight: Tensor, message: str, pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    refused(f"weights: {message}", call, weight, anchors[0])
    refused(rf"weights\[3\]: {message}", call, [*weights[:3], weight], anchors)
    model, named = moved_model("cpu")
    holder = SimpleNamespace(weight=weight)
    if (
        isinstance(weight, Tensor)
        and (weight.is_floating_point() or weight.is_complex())
        and not hasattr(weight, "placements")
    ):
        model.up.weight = nn.Parameter(holder.weight, requires_grad=False)
        refused(rf"up\.weight: {message}", call, model, named)


@pytest.mark.parametrize("call", CALLS)
def test_weights_that_are_none(call: Call, pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    expected = r"expected a tensor, a list of tensors or a torch\.nn\.Module"
    refused(f"weights: got NoneType, {expected}", call, None, anchors[0])
    refused(f"weights: got dict, {expected}", call, {"w": weights[0]}, {"w": anchors[0]})
    refused(f"weights: got generator, {expected}", call, (w for w in weights), anchors)
    refused(r"weights\[0\]: got str, expected a torch\.Tensor", call, "weight", anchors + anchors[:2])
    refused(r"weights\[1\]: got NoneType, expected a torch\.Tensor", call, [weights[0], None], anchors[:2])


@pytest.mark.parametrize("call", CALLS)
def test_anchors_that_are_none(call: Call, pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    model, named = moved_model("cpu")
    refused("anchors: got list, expected one Anchor for one weight tensor", call, weights[0], anchors)
    refused("anchors: got NoneType, expected one Anchor", call, weights[0], None)
    refused("anchors: got Anchor, expected a list of as many Anchors", call, weights, anchors[0])
    refused("anchors: got Anchors, expected a list of as many Anchors", call, weights, named)
    refused("anchors: got 3 for 4 weights, expected one Anchor per weight", call, weights, anchors[:3])
    refused("anchors: got 4 for 0 weights", call, [], anchors)
    refused(r"anchors\[2\]: got Tensor, expected an Anchor", call, weights, [*anchors[:2], weights[2], anchors[3]])
    refused(r"anchors: got list, expected Anchors for a module \(Anchors\.from_model", call, model, anchors)
    refused("anchors: got Anchor, expected Anchors for a module", call, model, anchors[0])
    refused("anchors: got none, expected at least one Anchor: nothing would be regularised", call, model, {})
    mixed = {**named, "up.weight": weights[0]}
    refused(r"anchors\['up\.weight'\]: got Tensor, expected an Anchor", call, model, mixed)


@pytest.mark.parametrize("call", CALLS)
def test_a_weight_that_changed_its_shape(call: Call, pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    expected = r"got shape \(24, 40\), expected \(40, 24\): the weight has changed its shape since it was anchored"
    refused(f"weights: {expected}", call, weights[1], anchors[0])
    refused(rf"weights\[3\]: {expected}", call, [*weights[:3], weights[1]], [*anchors[:3], anchors[0]])
    model, named = moved_model("cpu")
    model.up = nn.Linear(12, 31)
    refused(r"up\.weight: got shape \(31, 12\), expected \(30, 12\): .* anchor it again", call, model, named)


@pytest.mark.parametrize("call", CALLS)
def test_a_parameter_that_is_gone(call: Call) -> None:
    model, named = moved_model("cpu")
    model.down = nn.Identity()  # type: ignore[assignment]
    message = r"model: 1 of 4 anchored parameters are gone: 'down\.weight'; expected a parameter of each anchor's name"
    refused(message, call, model, named)
    many = {f"layers.{i}.weight": named["up.weight"] for i in range(7)}
    refused(
        r"model: 7 of 7 anchored parameters are gone: 'layers\.0\.weight'.*'layers\.4\.weight', \.\.\.;",
        call,
        model,
        many,
    )


@pytest.mark.parametrize("call", CALLS)
def test_a_weight_of_another_device(
    call: Call, monkeypatch: pytest.MonkeyPatch, pairs: tuple[list[Tensor], list[rk.Anchor]]
) -> None:
    weights, anchors = pairs
    model, named = moved_model("cpu")
    monkeypatch.setattr(rk.Anchor, "device", torch.device("cuda:1"))
    expected = (
        r"got a weight on cpu and its anchor on cuda:1, expected one device; move the anchor: anchors\.to\('cpu'\)"
    )
    refused(f"weights: {expected}", call, weights[0], anchors[0])
    refused(rf"weights\[0\]: {expected}", call, weights, anchors)
    refused(rf"embed\.weight: {expected}", call, model, named)


@pytest.mark.parametrize("call", CALLS)
def test_a_module_on_the_meta_device(call: Call) -> None:
    model, named = moved_model("cpu")
    refused(r"embed\.weight: got a tensor on the meta device", call, model.to("meta"), named)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", ANCHOR_FORMS)
def test_an_anchor_of_float64_for_another_dtype(call: Call, form: str) -> None:
    weight, anchor = anchored((20, 12), form, torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        other = weight.detach().to(dtype).requires_grad_()
        message = rf"weights: got {str(dtype)[6:]}, expected float64 like the weight that was anchored; anchor it again"
        refused(message, call, other, anchor)


def test_anchors_that_are_not_finite() -> None:
    weight = torch.ones(6, 4)
    weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match="^weight: got NaN or infinity, expected finite values only"):
        rk.Anchor.from_weight(weight, 2)
    model = nn.Linear(4, 6)
    with torch.no_grad():
        model.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"^weight: weight: got NaN or infinity"):
        rk.Anchors.from_model(model, 2, progress=False)


@pytest.mark.parametrize(
    "coeff",
    [
        float("nan"),
        float("inf"),
        -float("inf"),
        10**400,
        pytest.param(10**5000, id="5001 digits"),
        "1",
        b"1",
        None,
        True,
        1j,
        torch.tensor(True),
        torch.tensor(float("nan")),
        torch.tensor(1j),
        torch.ones(2),
        torch.ones((), device="meta"),
        torch.ones((), requires_grad=True),
        np.bool_(True),
        np.complex64(1),
    ],
)
def test_bad_coefficients(coeff: Any, pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    model, named = moved_model("cpu")
    for given in ((weights, anchors), (weights[0], anchors[0]), (model, named), ([], [])):
        refused(
            r"coeff: got .*, expected a finite number \(the paper's lambda\)",
            lambda w, a: rk.accumulate_rotation_grad_(w, a, coeff),
            *given,
        )


@pytest.mark.filterwarnings("ignore:.*block was computed by")
@pytest.mark.parametrize("form", ANCHOR_FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_coefficient_that_float32_does_not_hold(backend: str, form: str, device: torch.device) -> None:
    """Gradients are scaled by 2 coeff. Up to the largest, they are no NaN at the anchor."""
    weight, anchor = anchored((24, 40), form, device=device)
    if anchor.base is not None:
        weight.data.copy_(anchor.base)
    message = (
        r"coeff: got .*, expected at most 1\.7e\+38 in magnitude: weights\.grad is scaled by 2 coeff in float32, which"
    )
    with rk.use_backend(backend):
        for coeff in (1e39, 2.5e38, -2.5e38):
            refused(message, lambda w, a, c=coeff: rk.accumulate_rotation_grad_(w, a, c), weight, anchor)
        rk.accumulate_rotation_grad_(weight, anchor, 1.7e38)
    assert weight.grad is not None and not weight.grad.isnan().any()
    assert form == "block" or not weight.grad.any()


def test_coefficients_of_float64_weights_are_bounded_by_float64() -> None:
    weight, anchor = anchored((24, 40), "base", torch.float64)
    rk.accumulate_rotation_grad_(weight, anchor, 1e39)
    assert weight.grad is not None
    assert relative_error(weight.grad, exact_gradient(weight.detach(), anchor, 2e39)) < 1e-12
    refused(
        r"coeff: got 1e\+308, expected at most 9e\+307 in magnitude: weights\.grad is scaled by 2 coeff in float64",
        lambda w, a: rk.accumulate_rotation_grad_(w, a, 1e308),
        weight,
        anchor,
    )


def test_accumulation_needs_leaves_that_require_grad(pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    accumulate = CALLS[1]
    message = (
        r"got a tensor that is no leaf requiring grad, expected one that holds \.grad; call weight\.requires_grad_"
    )
    for bad in (weights[3] * 2, weights[3].detach()):
        refused(f"weights: {message}", accumulate, bad, anchors[3])
        refused(rf"weights\[3\]: {message}", accumulate, [*weights[:3], bad], anchors)


def test_accumulation_needs_something_that_trains() -> None:
    model, named = moved_model("cpu")
    model.requires_grad_(False)
    refused(
        "model: every anchored parameter is frozen, expected at least one that requires grad", CALLS[1], model, named
    )
    only = {"frozen.weight": named["frozen.weight"]}
    refused("model: every anchored parameter is frozen", CALLS[1], moved_model("cpu")[0], only)
    assert float(rk.rotation_penalty(model, named)) > 0


def test_accumulation_needs_dense_gradients(pairs: tuple[list[Tensor], list[rk.Anchor]]) -> None:
    weights, anchors = pairs
    message = (
        r"\.grad: got layout torch\.sparse_coo, expected a dense gradient \(torch\.nn\.Embedding\(sparse=False\)\)"
    )
    weights[3].grad = torch.ones(SHAPES[3]).to_sparse()
    refused(rf"weights\[3\]{message}", CALLS[1], weights, anchors)
    model, named = moved_model("cpu")
    model.embed.sparse = True
    model.embed(torch.tensor([1, 2])).sum().backward()
    refused(rf"embed\.weight{message}", CALLS[1], model, named)


def test_a_backend_that_cannot_serve_the_last_bucket_changes_nothing(device: torch.device) -> None:
    pairs = [
        anchored((20, 12), "base", dtype, seed=i, device=device)
        for i, dtype in enumerate((torch.float32, torch.float64))
    ]
    weights, anchors = [w for w, _ in pairs], [a for _, a in pairs]
    weights[0].grad = torch.ones_like(weights[0])
    with rk.use_backend("triton"):
        for call in CALLS:
            refused("backend 'triton' cannot serve float64 weights", call, weights, anchors)
