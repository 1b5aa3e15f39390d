"""Random subspaces: a control that differs from RPSFT in nothing but the directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rpsft_kernels as rk
from rpsft_kernels.anchors.random_subspace import random_subspaces


def _weight(m: int = 40, n: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed))


def _model() -> nn.Sequential:
    """Two weights of one shape, a narrow one (full from rank 5 on), and one without structure."""
    model = nn.Sequential(nn.Linear(24, 40), nn.Linear(24, 40), nn.Linear(40, 5), nn.Linear(40, 24))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def _anchors(model: nn.Module, rank: int | float = 6, **options: Any) -> rk.Anchors:
    return rk.Anchors.from_model(model, rank, progress=False, **{"subspace": "random", **options})


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_bases_are_orthonormal_and_the_energy_is_what_they_hold(shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    left, right, energy = random_subspaces(weight, 7, 0, "a")
    for basis, rows in ((left, shape[0]), (right, shape[1])):
        assert basis.shape == (rows, 7) and basis.dtype == torch.float64
        torch.testing.assert_close(basis.T @ basis, torch.eye(7, dtype=torch.float64), atol=1e-14, rtol=0)
    expected = (left.T @ weight.double() @ right).square().sum() / weight.double().square().sum()
    assert energy == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 30, 31, 40])
def test_both_factorisations_are_the_one_with_a_positive_diagonal(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    left, _, _ = random_subspaces(_weight(40, 40), rank, 0, "a")
    drawn: list[Tensor] = []
    monkeypatch.setattr(
        torch, "from_numpy", lambda array, make=torch.from_numpy: drawn.append(make(array)) or drawn[-1]
    )
    random_subspaces(_weight(40, 40), rank, 0, "a")
    triangle = left.T @ drawn[0]
    assert (triangle.diagonal() > 0).all()
    torch.testing.assert_close(triangle.tril(-1), torch.zeros_like(triangle), atol=1e-12, rtol=0)
    torch.testing.assert_close(left @ triangle, drawn[0], atol=1e-12, rtol=0)


def test_directions_are_uniform() -> None:
    # Of a uniform basis (m, k) every entry has the variance 1 / m; without a fixed sign of R the first row would not be
    # centred.
    drawn = torch.stack([random_subspaces(_weight(8, 6), 3, seed, "w")[0] for seed in range(2000)])
    assert drawn.mean(0).abs().max() < 5 * (1 / 8 / 2000) ** 0.5
    torch.testing.assert_close(drawn.square().mean(0), torch.full((8, 3), 1 / 8).double(), atol=0.02, rtol=0)


def test_they_depend_on_seed_name_and_side_alone() -> None:
    left, right, _ = random_subspaces(_weight(24, 24), 6, 0, "a")
    for weight in (_weight(24, 24, seed=1), _weight(24, 24).bfloat16(), _weight(24, 24).T):
        again = random_subspaces(weight, 6, 0, "a")
        assert torch.equal(again[0], left) and torch.equal(again[1], right)
    for other in (
        right,
        random_subspaces(_weight(24, 24), 6, 1, "a")[0],
        random_subspaces(_weight(24, 24), 6, 0, "b")[0],
    ):
        # Two unrelated subspaces of 6 in 24 directions share 1.5 of them on average.
        assert (left.T @ other).square().sum() < 3


def test_the_first_numbers_stay_those_of_this_version() -> None:
    # A seed in a file or a paper must give the same control later, on every processor.
    left, right, _ = random_subspaces(_weight(5, 4), 2, 3, "layers.0.weight")
    expected = [[0.8407724338, 0.1628599721], [-0.1913870482, -0.4412729277]]
    for basis, numbers in zip((left, right), expected, strict=True):
        torch.testing.assert_close(basis[0], torch.tensor(numbers, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("keep_base", [True, False])
def test_anchors_have_the_ranks_and_forms_of_singular_ones(keep_base: bool) -> None:
    model = _model()
    control, real = _anchors(model, keep_base=keep_base), _anchors(model, keep_base=keep_base, subspace="singular")
    assert list(control) == list(real) and control.nbytes == real.nbytes and control.skipped == real.skipped
    for name, anchor in control.items():
        other = real[name]
        assert (anchor.form, anchor.rank, anchor.shape) == (other.form, other.rank, other.shape)
        if anchor.form == "full":
            assert (anchor.subspace, anchor.random_seed, anchor.energy) == ("singular", None, 1.0)
            continue
        assert (anchor.subspace, anchor.random_seed) == ("random", 0) and other.subspace == "singular"
        assert anchor.left is not None and other.left is not None and not torch.equal(anchor.left, other.left)
        assert anchor.left.stride() == other.left.stride() and 0 < anchor.energy < other.energy
    assert not torch.equal(*(torch.as_tensor(control[name].left) for name in ("0.weight", "1.weight")))
    control.verify(model)
    with torch.no_grad():
        assert rk.rotation_penalty(model, control).item() == 0.0


def test_the_penalty_is_that_of_the_drawn_subspaces() -> None:
    model = _model()
    anchors, before = _anchors(model, basis_dtype=torch.float32), [p.detach().double() for p in model.parameters()]
    expected = 0.0
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), before, strict=True):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
            if parameter.ndim == 2:
                name = next(n for n, p in model.named_parameters() if p is parameter)
                drift = parameter.double() - start
                if anchors[name].form != "full":
                    left, right, _ = random_subspaces(start, 6, 0, name)
                    drift = left.T @ drift @ right
                expected += drift.square().sum().item()
        assert rk.rotation_penalty(model, anchors).item() == pytest.approx(expected, rel=1e-5)


def test_a_share_of_energy_has_the_ranks_of_singular_subspaces() -> None:
    model = _model()
    control, real = _anchors(model, 0.6), _anchors(model, 0.6, subspace="singular")
    assert [a.rank for a in control.values()] == [a.rank for a in real.values()]
    assert all(a.share == 0.6 for a in control.values())


def test_nobody_mistakes_a_control(tmp_path: Path) -> None:
    model = _model()
    anchors = _anchors(model, seed=12)
    assert "subspaces: random, a control for experiments (seed 12)" in repr(anchors)
    assert "\nsubspaces: random, a control for experiments (seed 12)\n" in anchors.summary()
    assert "subspace='random', random_seed=12" in repr(anchors["0.weight"])
    anchors.save(tmp_path / "anchors")
    read = rk.Anchors.load(tmp_path / "anchors", model)
    assert repr(read) == repr(anchors) and read.summary() == anchors.summary()
    assert repr(read.to("cpu")) == repr(anchors)
    real = _anchors(model, subspace="singular", seed=12)
    assert "random" not in repr(real) + real.summary() + repr(real["0.weight"])


def test_blocks_can_be_rebuilt() -> None:
    model = _model()
    anchor = _anchors(model, keep_base=False)["0.weight"]
    rebuilt = anchor.rebuilt_block(model[0].weight)  # type: ignore[arg-type]
    assert rebuilt.random_seed == 0 and torch.equal(torch.as_tensor(rebuilt.block), torch.as_tensor(anchor.block))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subspace": "gaussian"}, "subspace: got 'gaussian', expected 'singular', or 'random' for the control"),
        ({"seed": -1}, "seed: got -1, expected an int of at least 0"),
        ({"seed": True}, "seed: got True, expected an int of at least 0"),
        ({"seed": 1.0}, "seed: got 1.0, expected an int of at least 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _anchors(_model(), **options)


def test_a_full_anchor_has_no_seed() -> None:
    with pytest.raises(ValueError, match="random_seed: got 3 without left and right, expected None"):
        rk.Anchor(base=torch.ones(4, 4), shape=(4, 4), weight_dtype=torch.float32, rank=4, energy=1.0, random_seed=3)
