"""The modes after the step against their closed forms in float64, on every form and backend."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from closed_forms import corrected, exact_drifts, exact_penalty_of
from rpsft_kernels.training.corrections import proximal_share

RANK = 8
# Relative to the correction, beside the rounding of the weights: C and P are bfloat16 with such bases, else float32.
ROUNDED, EXACT = 1e-2, 1e-5
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
# Interpreted kernels take seconds: both forms and both bases once.
CASES = [
    *itertools.product(("native", "torch"), ("base", "block"), (BFLOAT16, FLOAT32)),
    ("triton", "base", BFLOAT16),
    ("triton", "block", FLOAT32),
]


class Layers(nn.Module):
    """Weights of awkward shapes, of which the last has a full anchor; columns of ``wide`` are contiguous."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        sizes = {"tall": (67, 33), "wide": (21, 50), "small": (6, 19)}
        for name, shape in sizes.items():
            values = 0.2 * torch.randn(shape, generator=generator, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(values.to(dtype)))
        self.wide = nn.Parameter(self.wide.detach().T.contiguous().T)
        self.bias = nn.Parameter(torch.ones(5))


def _drift(model: nn.Module, scale: float = 0.01) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((scale * noise).to(parameter.dtype))


def _moved(form: str, basis_dtype: torch.dtype, dtype: torch.dtype = torch.float32) -> tuple[Layers, rk.Anchors]:
    model = Layers(dtype)
    anchors = rk.Anchors.from_model(model, RANK, keep_base=form == "base", basis_dtype=basis_dtype, progress=False)
    assert [anchor.form for anchor in anchors.values()] == [form, form, "full"]
    _drift(model)
    return model, anchors


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def _errors(model: nn.Module, before: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Return the error of each correction beyond the rounding of its weight, relative to the correction."""
    errors = {}
    for name, exact in expected.items():
        weight, correction = model.get_parameter(name).detach(), exact - before[name].double()
        rounding = torch.finfo(weight.dtype).eps / 2 * float(exact.norm())
        error = float((weight.double() - exact).norm()) - rounding
        errors[name] = max(error, 0.0) / float(correction.norm())
    return errors


@pytest.mark.parametrize(("backend", "form", "basis_dtype"), CASES)
def test_a_proximal_step(backend: str, form: str, basis_dtype: torch.dtype) -> None:
    with rk.use_backend(backend):
        model, anchors = _moved(form, basis_dtype)
        before, penalty = _snapshot(model), exact_penalty_of(model, anchors)
        share = 2 * 0.1 * 3.0 / (1 + 2 * 0.1 * 3.0)
        expected = corrected(model, anchors, share)
        rotation = rk.RotationPenalty(anchors=anchors, coeff=3.0, mode="decoupled")
        left = float(rotation.after_step_(model, lr=0.1))
    bound = ROUNDED if basis_dtype == BFLOAT16 and backend != "torch" else EXACT
    for name, error in _errors(model, before, expected).items():
        assert error < bound, (name, error)
    assert torch.equal(model.bias, before["bias"])
    assert left == pytest.approx(penalty * (1 - share) ** 2, rel=1e-3)
    assert exact_penalty_of(model, anchors) == pytest.approx(left, rel=2e-3)
    assert rotation.step == 1


@pytest.mark.parametrize("excess", [1.05, 30.0])
@pytest.mark.parametrize(("backend", "form", "basis_dtype"), CASES)
def test_a_projection_ends_at_the_budget(backend: str, form: str, basis_dtype: torch.dtype, excess: float) -> None:
    with rk.use_backend(backend):
        model, anchors = _moved(form, basis_dtype)
        before, penalty = _snapshot(model), exact_penalty_of(model, anchors)
        bound = penalty / excess
        energy = rk.RotationPenalty(anchors=anchors).anchor(model).state_dict()["energy"]
        budget = math.sqrt(bound / energy)
        rotation = rk.RotationPenalty(anchors=anchors, budget=budget, mode="project")
        expected = corrected(model, anchors, 1 - math.sqrt(bound / penalty))
        left = float(rotation.after_step_(model, lr=0.0))
        within = _snapshot(model)
        rk.RotationPenalty(anchors=anchors, budget=1.01 * budget, mode="project").after_step_(model, lr=0.1)
    assert exact_penalty_of(model, anchors) == pytest.approx(bound, rel=1e-3)
    assert left == pytest.approx(bound, rel=1e-3)
    assert rotation.metrics()["rotation/budget_used"] == pytest.approx(1.0, rel=1e-3)
    # One factor for all weights.
    for name, error in _errors(model, before, expected).items():
        assert error < (ROUNDED if basis_dtype == BFLOAT16 else 1e-3), (name, error)
    # Within the budget nothing is touched.
    assert all(torch.equal(within[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("form", "budget"), [("base", 1e-6), ("base", 1e-3), ("block", 1e-6), ("block", 1e-3)])
def test_what_a_projection_from_far_away_leaves_is_what_it_reports(form: str, budget: float) -> None:
    # Rounding of C may keep R from a budget that is far below what moved outside of the subspaces.
    model, anchors = _moved(form, torch.bfloat16)
    _drift(model, 0.2)
    rotation = rk.RotationPenalty(anchors=anchors, budget=budget, mode="project")
    left = float(rotation.after_step_(model, lr=0.1))
    assert left == pytest.approx(rk.rotation_penalty(model, anchors).item(), rel=1e-3)
    assert rotation.metrics()["rotation/R"] == left


@pytest.mark.parametrize("mode", ["decoupled", "project"])
def test_float64_weights_are_corrected_in_float64(mode: str) -> None:
    model, anchors = _moved("block", torch.float64, torch.float64)
    before, penalty = _snapshot(model), exact_penalty_of(model, anchors)
    share = proximal_share(0.1, 10.0) if mode == "decoupled" else 1 - math.sqrt(0.2)
    expected = corrected(model, anchors, share)
    energy = rk.RotationPenalty(anchors=anchors).anchor(model).state_dict()["energy"]
    strength = {"coeff": 10.0} if mode == "decoupled" else {"budget": math.sqrt(0.2 * penalty / energy)}
    rk.RotationPenalty(anchors=anchors, mode=mode, **strength).after_step_(model, lr=0.1)  # type: ignore[arg-type]
    assert max(_errors(model, before, expected).values()) < 1e-12
    assert exact_penalty_of(model, anchors) == pytest.approx(penalty * (1 - share) ** 2, rel=1e-12)


def test_a_step_with_a_huge_coeff_ends_near_the_pretrained_block() -> None:
    model, anchors = _moved("base", torch.float32)
    penalty = exact_penalty_of(model, anchors)
    rk.RotationPenalty(anchors=anchors, coeff=1e30, mode="decoupled").after_step_(model, lr=1e-3)
    assert exact_penalty_of(model, anchors) < 1e-9 * penalty
    assert proximal_share(1e-3, 1e300) == proximal_share(1e10, 1e305) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_weights_of_16_bits_round_the_correction_to_their_dtype(dtype: torch.dtype, backend: str) -> None:
    model, anchors = _moved("base", torch.bfloat16, dtype)
    expected = corrected(model, anchors, proximal_share(0.1, 3.0))
    rotation = rk.RotationPenalty(anchors=anchors, coeff=3.0, mode="decoupled")
    message = r"got weights in b?float16, expected float32 ones \(masters\)"
    with rk.use_backend(backend), pytest.warns(UserWarning, match=message):
        rotation.after_step_(model, lr=0.1)
    for name, exact in expected.items():
        weight = model.get_parameter(name).detach()
        # One unit in the last place: rounded once, of a sum that is itself off by rounded C and P.
        spacing = torch.finfo(dtype).eps * exact.abs()
        assert bool(((weight.double() - exact).abs() <= spacing + 1e-4).all()), name


def test_what_rounding_leaves_of_a_projection_is_measured() -> None:
    model, anchors = _moved("base", torch.bfloat16, torch.bfloat16)
    energy = rk.RotationPenalty(anchors=anchors).anchor(model).state_dict()["energy"]
    # So near the bound that hardly a bfloat16 number changes.
    budget = math.sqrt(exact_penalty_of(model, anchors) / 1.002 / energy)
    rotation = rk.RotationPenalty(anchors=anchors, budget=budget, mode="project")
    with pytest.warns(UserWarning, match="got weights in bfloat16"):
        left = float(rotation.after_step_(model, lr=0.1))
    assert left == pytest.approx(exact_penalty_of(model, anchors), rel=1e-4)
    assert left > 1.0005 * budget**2 * energy


def test_each_weight_has_the_learning_rate_of_its_own() -> None:
    model, anchors = _moved("base", torch.float32)
    drifts, before = exact_drifts(model, anchors), _snapshot(model)
    rates = {"tall": 0.1, "wide": 0.01, "small": 0.0}
    shares = {name: proximal_share(rate, 3.0) for name, rate in rates.items()}
    expected = corrected(model, anchors, shares)
    rotation = rk.RotationPenalty(anchors=anchors, coeff=3.0, mode="decoupled")
    # Capturable optimizers keep theirs in tensors.
    by_id = {id(model.get_parameter(name)): torch.tensor(rate, dtype=torch.float64) for name, rate in rates.items()}
    left = rotation.after_step_(model, by_id)  # type: ignore[arg-type]
    assert torch.equal(model.small, before["small"])
    del expected["small"]
    for name, error in _errors(model, before, expected).items():
        assert error < EXACT, (name, error)
    exact = sum(float(drift.square().sum()) * (1 - shares[name]) ** 2 for name, drift in drifts.items())
    assert float(left) == pytest.approx(exact, rel=1e-5)


def test_frozen_weights_keep_their_part_of_r() -> None:
    model, anchors = _moved("base", torch.float32)
    model.tall.requires_grad_(False)
    before = _snapshot(model)
    drifts = {name: float(drift.square().sum()) for name, drift in exact_drifts(model, anchors).items()}
    energy = rk.RotationPenalty(anchors=anchors).anchor(model).state_dict()["energy"]
    bound = drifts["tall"] + 0.1 * (drifts["wide"] + drifts["small"])
    rotation = rk.RotationPenalty(anchors=anchors, budget=math.sqrt(bound / energy), mode="project")
    assert float(rotation.after_step_(model, lr=0.1)) == pytest.approx(bound, rel=1e-3)
    assert exact_penalty_of(model, anchors) == pytest.approx(bound, rel=1e-3)
    assert torch.equal(model.tall, before["tall"])
    # A budget that the frozen weight alone exceeds.
    rotation = rk.RotationPenalty(anchors=anchors, budget=math.sqrt(0.5 * drifts["tall"] / energy), mode="project")
    assert float(rotation.after_step_(model, lr=0.1)) == pytest.approx(drifts["tall"], rel=1e-3)
    assert rotation.metrics()["rotation/budget_used"] == pytest.approx(math.sqrt(2), rel=1e-3)
    left = rk.RotationPenalty(anchors=anchors, coeff=3.0, mode="decoupled").after_step_(model, lr=0.1)
    assert float(left) == pytest.approx(exact_penalty_of(model, anchors), rel=1e-3)


def test_autograd_sees_that_weights_were_written() -> None:
    model, anchors = _moved("base", torch.float32)
    loss = (model.wide * model.wide).sum()
    rk.RotationPenalty(anchors=anchors, coeff=3.0, mode="decoupled").after_step_(model, lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_r_of_each_weight() -> None:
    model, anchors = _moved("block", torch.float32)
    drifts = exact_drifts(model, anchors)
    rotation = rk.RotationPenalty(anchors=anchors, coeff=3.0, mode="decoupled", per_layer=True, log_every=2)
    rotation.after_step_(model, lr=0.1)
    metrics = rotation.metrics()
    for name, drift in drifts.items():
        assert metrics[f"rotation/layers/{name}"] == pytest.approx(float(drift.square().sum()), rel=1e-5), name
    assert sum("/layers/" in name for name in metrics) == 3


# -- refusals -------------------------------------------------------------------------------------------------


def _freeze(model: Layers) -> None:
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def _share_memory(model: Layers) -> None:
    buffer = torch.zeros(21 * 50 + 6 * 19 - 1)
    model.wide = nn.Parameter(buffer[: 21 * 50].view(21, 50))
    model.small = nn.Parameter(buffer[21 * 50 - 1 :].view(6, 19))


def _expand(model: Layers) -> None:
    model.wide = nn.Parameter(torch.zeros(1, 50).expand(21, 50))


def _main_grad(model: Layers) -> None:
    model.wide.main_grad = torch.zeros(21, 50)  # type: ignore[attr-defined, assignment]


@pytest.mark.parametrize("mode", ["decoupled", "project"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_freeze, "every anchored parameter is frozen, expected at least one that trains"),
        (_share_memory, "small: got a weight that shares memory with wide, expected memory of its own"),
        (_expand, "wide: got elements that share memory"),
        (_main_grad, "wide: got a parameter with a main_grad"),
    ],
)
def test_weights_that_cannot_be_corrected(mode: str, change: Callable[[Layers], None], message: str) -> None:
    model, anchors = _moved("base", torch.float32)
    change(model)
    strength = {"coeff": 3.0} if mode == "decoupled" else {"budget": 1e-6}
    rotation = rk.RotationPenalty(anchors=anchors, mode=mode, **strength)  # type: ignore[arg-type]
    before = _snapshot(model)
    with pytest.raises(ValueError, match=message):
        rotation.after_step_(model, lr=0.1)
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert rotation.step == 0


def test_one_weight_with_two_anchors() -> None:
    model, anchors = _moved("base", torch.float32)
    model.twin = model.wide
    both = rk.Anchors({**anchors, "twin": anchors["wide"]})
    with pytest.raises(ValueError, match="twin: got a weight that has another anchor too"):
        rk.RotationPenalty(anchors=both, mode="decoupled").after_step_(model, lr=0.1)


def test_weights_that_are_not_finite() -> None:
    model, anchors = _moved("base", torch.float32)
    with torch.no_grad():
        model.wide[0, 0] = math.nan
    before = model.tall.detach().clone()
    with pytest.raises(ValueError, match="got R = nan, expected finite weights; none of them was changed"):
        rk.RotationPenalty(anchors=anchors, budget=1e-3, mode="project").after_step_(model, lr=0.1)
    assert torch.equal(model.tall, before)


@pytest.mark.parametrize("lr", [-0.1, math.nan, math.inf, True, "0.1", {}, {1: -1.0}])
def test_learning_rates_that_are_none(lr: object) -> None:
    model, anchors = _moved("base", torch.float32)
    with pytest.raises(ValueError, match="lr: got .* expected a?"):
        rk.RotationPenalty(anchors=anchors, mode="decoupled").after_step_(model, lr)  # type: ignore[arg-type]


def test_a_weight_without_a_learning_rate() -> None:
    model, anchors = _moved("base", torch.float32)
    with pytest.raises(ValueError, match="wide: got no learning rate for this weight"):
        rk.RotationPenalty(anchors=anchors, mode="decoupled").after_step_(model, {id(model.tall): 0.1})
