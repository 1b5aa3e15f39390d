from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import rpsft_kernels as rk
import rpsft_kernels.anchors.subspace as subspace
from rpsft_kernels.anchors.make import AnchorOptions, solve
from rpsft_kernels.anchors.subspace import captured_energy, largest_rank, subspaces_of_share, top_subspaces


def _matrix(m: int, n: int, seed: int = 0) -> Tensor:
    """An (m, n) float64 matrix with singular values 1, 0.8, 0.64, ..., well apart."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64))[0]
    values = torch.pow(0.8, torch.arange(min(m, n), dtype=torch.float64))
    product: Tensor = (left * values) @ right.T
    return product


def _sine_of_angle(basis: Tensor, reference: Tensor) -> float:
    """Sine of the largest principal angle between two orthonormal bases."""
    return float(torch.linalg.matrix_norm(basis - reference @ (reference.T @ basis), 2))


def _assert_orthonormal(basis: Tensor) -> None:
    identity = torch.eye(basis.shape[1], dtype=torch.float64)
    torch.testing.assert_close(basis.T @ basis, identity, atol=1e-13, rtol=0)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (300, 12), (12, 300)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_subspaces_are_those_of_the_svd(shape: tuple[int, int], rank: int) -> None:
    weight = _matrix(*shape)
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    spaces = top_subspaces(weight, rank)
    assert spaces.left.shape == (shape[0], rank) and spaces.right.shape == (shape[1], rank)
    assert _sine_of_angle(spaces.left, u[:, :rank]) < 1e-12
    assert _sine_of_angle(spaces.right, vh[:rank].T) < 1e-12
    torch.testing.assert_close(spaces.values, s[:rank], atol=1e-14, rtol=1e-13)
    assert spaces.energy == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), abs=1e-14)
    _assert_orthonormal(spaces.left)
    _assert_orthonormal(spaces.right)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_weights_are_decomposed_in_float64(dtype: torch.dtype) -> None:
    weight = _matrix(64, 48).to(dtype)
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    spaces = top_subspaces(weight, 6)
    assert spaces.left.dtype == spaces.values.dtype == spaces.right.dtype == torch.float64
    assert _sine_of_angle(spaces.left, u[:, :6]) < 1e-11
    assert _sine_of_angle(spaces.right, vh[:6].T) < 1e-11


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_projection_has_a_non_negative_diagonal(shape: tuple[int, int]) -> None:
    weight = _matrix(*shape, seed=3)
    spaces = top_subspaces(weight, 10)
    projected = spaces.left.T @ weight @ spaces.right
    torch.testing.assert_close(projected, torch.diag(spaces.values), atol=1e-13, rtol=0)
    assert (projected.diagonal() > 0).all()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_rank_deficient_weight_gets_orthonormal_bases(shape: tuple[int, int]) -> None:
    u, s, vh = torch.linalg.svd(_matrix(*shape), full_matrices=False)
    weight = (u[:, :4] * s[:4]) @ vh[:4]
    spaces = top_subspaces(weight, 9)
    _assert_orthonormal(spaces.left)
    _assert_orthonormal(spaces.right)
    assert _sine_of_angle(u[:, :4], spaces.left) < 1e-12
    assert _sine_of_angle(vh[:4].T, spaces.right) < 1e-12
    assert spaces.values[4:].abs().max() < 1e-14
    assert (spaces.values.diff() <= 0).all() and (spaces.values >= 0).all()
    assert spaces.energy == pytest.approx(1.0, abs=1e-14) and spaces.energy <= 1.0


def test_zero_matrix() -> None:
    spaces = top_subspaces(torch.zeros(7, 5), 3)
    _assert_orthonormal(spaces.left)
    _assert_orthonormal(spaces.right)
    assert spaces.values.tolist() == [0.0, 0.0, 0.0]
    assert spaces.energy == 1.0


@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_vectors(shape: tuple[int, int]) -> None:
    weight = torch.arange(1.0, 1.0 + max(shape)).reshape(shape) * -1
    spaces = top_subspaces(weight, 1)
    norm = float(weight.double().norm())
    assert spaces.values.item() == pytest.approx(norm, rel=1e-15)
    assert (spaces.left.T @ weight.double() @ spaces.right).item() == pytest.approx(norm, rel=1e-15)


@pytest.mark.parametrize("shape", [(37, 20), (20, 37)])
def test_chunks_do_not_change_the_result(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _matrix(*shape)
    whole = top_subspaces(weight, 5)
    monkeypatch.setattr(subspace, "_CHUNK_ELEMENTS", 60)
    cut = top_subspaces(weight, 5)
    assert _sine_of_angle(cut.left, whole.left) < 1e-12
    assert _sine_of_angle(cut.right, whole.right) < 1e-12
    assert cut.energy == pytest.approx(whole.energy, abs=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_float64_copy_of_the_weight(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subspace, "_CHUNK_ELEMENTS", 1 << 16)
    weight = torch.randn(8192, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        top_subspaces(weight, 2)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    float64_copy = weight.numel() * 8
    assert 0 < largest < float64_copy / 8


def test_transposed_view_swaps_the_sides() -> None:
    weight = _matrix(33, 21)
    direct, swapped = top_subspaces(weight, 4), top_subspaces(weight.T, 4)
    assert _sine_of_angle(swapped.left, direct.right) < 1e-12
    assert _sine_of_angle(swapped.right, direct.left) < 1e-12


@pytest.mark.parametrize("factor", [1e-200, 1e200])
def test_extreme_float64_scales(factor: float) -> None:
    weight = _matrix(20, 12)
    plain, scaled = top_subspaces(weight, 4), top_subspaces(weight * factor, 4)
    assert _sine_of_angle(scaled.left, plain.left) < 1e-12
    torch.testing.assert_close(scaled.values / factor, plain.values, atol=0, rtol=1e-12)
    assert scaled.energy == pytest.approx(plain.energy, abs=1e-12)


def test_weight_is_left_as_it_was() -> None:
    weight = torch.nn.Parameter(_matrix(9, 6))
    before = weight.detach().clone()
    spaces = top_subspaces(weight, 2)
    assert torch.equal(weight, before) and not spaces.left.requires_grad and not spaces.values.requires_grad


@pytest.mark.parametrize("rank", [0, -1, 5, 2.0, True, "2", None])
def test_rank_out_of_range(rank: object) -> None:
    with pytest.raises(ValueError, match=r"rank: got .*, expected an int between 1 and min\(6, 4\) = 4"):
        top_subspaces(torch.ones(6, 4), rank)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (300, 12)])
@pytest.mark.parametrize("share", [1e-9, 0.3, 0.36, 0.9, 0.999])
def test_a_share_takes_the_fewest_directions_that_hold_it(shape: tuple[int, int], share: float) -> None:
    weight = _matrix(*shape)
    energies = torch.linalg.svdvals(weight).square().cumsum(0)
    expected = 1 + int((energies / energies[-1] < share).sum())
    if expected == min(shape):
        assert subspaces_of_share(weight, share) is None
        return
    spaces, same = subspaces_of_share(weight, share), top_subspaces(weight, expected)
    assert spaces is not None and spaces.energy == same.energy >= share
    for side in ("left", "values", "right"):
        assert torch.equal(getattr(spaces, side), getattr(same, side))
    assert expected == 1 or top_subspaces(weight, expected - 1).energy < share


def test_the_energy_at_a_rank_takes_that_rank() -> None:
    # The sum of all energies up to k is rounded in another order than that of the k largest.
    weight = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    for rank in range(1, 30):
        spaces = subspaces_of_share(weight, top_subspaces(weight, rank).energy)
        assert spaces is not None and spaces.left.shape == (50, rank)


def test_a_share_of_flat_and_zero_weights() -> None:
    for share, rank in ((0.5, 5), (0.55, 6), (0.91, 10)):
        spaces = subspaces_of_share(torch.eye(10), share)
        assert rank == 10 if spaces is None else spaces.left.shape[1] in (rank, rank + 1)
        assert (10 if spaces is None else spaces.left.shape[1]) <= largest_rank((10, 10), share)
    zero = subspaces_of_share(torch.zeros(4, 3), 0.9)
    assert zero is not None and zero.left.shape == (4, 1) and zero.energy == 1.0
    assert subspaces_of_share(torch.ones(1, 5), 0.1) is None


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_no_weight_takes_more_than_the_largest_rank(share: float) -> None:
    for shape in ((1, 1), (2, 7), (30, 20), (20, 30)):
        largest = largest_rank(shape, share)
        assert 1 <= largest <= min(shape)
        flat = torch.linalg.qr(torch.randn(shape, generator=torch.Generator().manual_seed(1)).double())[0]
        for weight in (flat, torch.rand(shape, generator=torch.Generator().manual_seed(2))):
            spaces = subspaces_of_share(weight, share)
            assert (min(shape) if spaces is None else spaces.left.shape[1]) <= largest


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan"), 3, True, None])
def test_share_out_of_range(share: object) -> None:
    with pytest.raises(ValueError, match=r"(rank|share): got .*, expected"):
        subspaces_of_share(torch.ones(6, 4), share)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_share_of_a_spectrum_that_is_not_finite_is_not_taken_for_all(
    value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh = torch.linalg.eigh

    def broken(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = eigh(matrix)
        return values * value, vectors

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    with pytest.warns(UserWarning, match="got NaN or infinity; torch.linalg.svd on the CPU is tried"):
        spaces = subspaces_of_share(_matrix(9, 6), 0.5)
    assert spaces is not None and spaces.left.shape == (9, 2)


@pytest.mark.parametrize("shape", [(37, 20), (20, 37)])
@pytest.mark.parametrize("scale", [1.0, 1e-200])
def test_energy_between_two_subspaces(shape: tuple[int, int], scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _matrix(*shape)
    spaces = top_subspaces(weight, 5)
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(size, 5, generator=generator).double())[0] for size in shape)
    expected = float((left.T @ weight @ right).square().sum() / weight.square().sum())
    monkeypatch.setattr(subspace, "_CHUNK_ELEMENTS", 60)
    assert captured_energy(weight * scale, left, right) == pytest.approx(expected, rel=1e-12)
    assert captured_energy(weight * scale, spaces.left, spaces.right) == pytest.approx(spaces.energy, rel=1e-12)
    assert captured_energy(weight * 0, left, right) == 1.0


@pytest.mark.parametrize("weight", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(0, 4), torch.ones(2, 2).int()])
def test_not_a_matrix(weight: Tensor) -> None:
    with pytest.raises(ValueError, match="weight: got shape .* expected a non-empty 2-D floating point tensor"):
        top_subspaces(weight, 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(value: float) -> None:
    weight = torch.ones(4, 4)
    weight[2, 1] = value
    with pytest.raises(ValueError, match="weight: got NaN or infinity"):
        top_subspaces(weight, 1)


def _fail(times: int, monkeypatch: pytest.MonkeyPatch, solver: str = "eigh", error: str = "did not converge") -> None:
    """Let the first calls of a solver of torch.linalg fail."""
    solve, calls = getattr(torch.linalg, solver), iter(range(times))

    def fail(matrix: Tensor) -> Any:
        if next(calls, None) is not None:
            raise torch.linalg.LinAlgError(f"linalg.{solver}: The algorithm {error}.")
        return solve(matrix)

    monkeypatch.setattr(torch.linalg, solver, fail)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_another_solver_is_tried(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = _matrix(*shape, seed=5)
    expected = top_subspaces(weight, 7)
    _fail(1, monkeypatch)
    message = r"were not found by torch\.linalg\.eigh on the CPU: .*did not converge\.; torch\.linalg\.svd on the"
    with pytest.warns(UserWarning, match=message):
        spaces = top_subspaces(weight, 7)
    # Each vector has the sign that the solver gave it.
    signs = (spaces.left * expected.left).sum(0).sign()
    torch.testing.assert_close(spaces.left * signs, expected.left, atol=1e-12, rtol=0)
    torch.testing.assert_close(spaces.right * signs, expected.right, atol=1e-12, rtol=0)
    torch.testing.assert_close(spaces.values, expected.values, atol=1e-14, rtol=1e-13)
    assert spaces.energy == pytest.approx(expected.energy, abs=1e-14)


@pytest.mark.parametrize("weight", [torch.zeros(7, 5), torch.ones(6, 9)], ids=["zeros", "ones"])
def test_another_solver_finds_bases_of_null_directions(weight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(1, monkeypatch)
    with pytest.warns(UserWarning, match="is tried"):
        spaces = top_subspaces(weight, 3)
    _assert_orthonormal(spaces.left)
    _assert_orthonormal(spaces.right)
    assert spaces.energy == pytest.approx(1.0, abs=1e-14)


def test_values_that_are_not_finite_are_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    solve = torch.linalg.eigh

    def spoil(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = solve(matrix)
        return values, vectors * float("nan")

    monkeypatch.setattr(torch.linalg, "eigh", spoil)
    with pytest.warns(
        UserWarning, match="eigh on the CPU: RuntimeError: got NaN or infinity; .*svd on the CPU is tried"
    ):
        _assert_orthonormal(top_subspaces(_matrix(9, 6), 2).left)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_no_solver_finds_is_told_with_the_weights_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 6))
    _fail(1, monkeypatch, "eigh")
    _fail(1, monkeypatch, "svd")
    failed = r"torch\.linalg\.eigh on the CPU: .*did not converge\.; torch\.linalg\.svd on the CPU: .*did not"
    with pytest.raises(RuntimeError, match=rf"^0\.weight: weight: its singular subspaces were not found: {failed}"):
        rk.Anchors.from_model(model, 2, progress=False)


class _OnMps(Tensor):
    """A tensor on the CPU that says that it is on an Apple GPU, and has no float64 there."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> _OnMps:
        if values.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        wrapper: _OnMps = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device="mps"
        )
        wrapper.values = values
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        if leaves and kwargs.get("dtype") == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        result = func(*tree_map_only(_OnMps, lambda tensor: tensor.values, args), **kwargs)
        return result if leaves else tree_map_only(Tensor, _OnMps, result)


class _WithMps(TorchFunctionMode):
    """Makes tensors on that GPU, and reads numbers from it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to and type(args[0]) is Tensor and torch.device("mps") in args:
            return _OnMps(args[0])
        if func in (Tensor.__float__, torch.equal):
            return func(*tree_map_only(_OnMps, lambda tensor: tensor.values, args))
        if kwargs.get("device") == torch.device("mps"):
            return _OnMps(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)


@pytest.mark.parametrize("shape", [(24, 18), (18, 24)])
def test_a_device_without_float64_leaves_it_to_the_cpu(shape: tuple[int, int]) -> None:
    weight = _matrix(*shape).float()
    with pytest.raises(TypeError, match="float64"):
        _OnMps(weight).to(torch.float64)
    with _WithMps():
        spaces = top_subspaces(_OnMps(weight), 4)
    expected = top_subspaces(weight, 4)
    assert spaces.left.device.type == "cpu" and torch.equal(spaces.left, expected.left)
    assert torch.equal(spaces.right, expected.right) and spaces.energy == expected.energy
    options = AnchorOptions(4)
    whole, whole_basis = solve(weight, options)
    with _WithMps():
        solution, basis = solve(_OnMps(weight), options)
    assert solution == whole and basis is not None and whole_basis is not None
    for side, expected_side in ((basis.left, whole_basis.left), (basis.right, whole_basis.right)):
        assert isinstance(side, _OnMps) and torch.equal(side.values, expected_side)
