from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rpsft_kernels import ops
from rpsft_kernels.anchors.anchor import Anchor
from rpsft_kernels.anchors.subspace import top_subspaces

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _weight(m: int = 48, n: int = 36, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(m * 1000 + n)
    return (torch.randn(m, n, generator=generator, dtype=torch.float64) * 0.02).to(device, dtype)


def _backend(weight: Tensor) -> str:
    return ops.resolve_backend(weight.device, weight.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(48, 36), (36, 48)])
def test_base_form(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    weight = _weight(*shape, dtype, device)
    anchor = Anchor.from_weight(weight, 10)
    spaces = top_subspaces(weight, 10)
    assert anchor.form == "base" and anchor.block is None and anchor.arithmetic is None
    assert anchor.left is not None and anchor.right is not None and anchor.base is not None
    assert torch.equal(anchor.left, spaces.left.bfloat16()) and anchor.left.dtype == torch.bfloat16
    assert torch.equal(anchor.right, spaces.right.bfloat16()) and anchor.right.dtype == torch.bfloat16
    assert torch.equal(anchor.base.to(dtype), weight)
    assert anchor.base.dtype == dtype
    assert (anchor.shape, anchor.weight_dtype, anchor.rank) == (shape, dtype, 10)
    assert anchor.energy == spaces.energy and 0 < anchor.energy < 1
    assert anchor.device == weight.device
    assert anchor.nbytes == sum(shape) * 16 * 2 + weight.nbytes
    assert anchor.left.stride() == anchor.right.stride() == (16, 1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 10, 16])
@pytest.mark.parametrize("shape", [(48, 36), (36, 48)])
def test_block_form_cancels_to_the_last_bit(dtype: torch.dtype, rank: int, shape: tuple[int, int], device: str) -> None:
    weight = _weight(*shape, dtype, device)
    anchor = Anchor.from_weight(weight, rank, keep_base=False)
    assert anchor.form == "block" and anchor.base is None
    assert anchor.left is not None and anchor.right is not None and anchor.block is not None
    exact = anchor.left.double().T @ weight.double() @ anchor.right.double()
    bound = 1e-13 if dtype == torch.float64 else 1e-5
    assert (anchor.block.double() - exact).norm() <= bound * exact.norm()
    assert anchor.block.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert anchor.arithmetic == ops.arithmetic_id(_backend(weight), weight.device, dtype)
    drifts, squares = ops.project_drift(
        ops.Operands([weight], [anchor.left], [anchor.right], [], [anchor.block]), _backend(weight)
    )
    assert not drifts[0].any() and not squares.any()
    moved = anchor.to("cpu").to(device)
    assert moved.left is not None and moved.right is not None and moved.block is not None
    # The kernels of a GPU are chosen by how the weight lies, and with them the order of their sums.
    lies = weight if _backend(weight) == "triton" else weight.T.contiguous().T
    drifts, squares = ops.project_drift(
        ops.Operands([lies], [moved.left], [moved.right], [], [moved.block]), _backend(weight)
    )
    assert not drifts[0].any() and not squares.any()


@pytest.mark.parametrize("keep_base", [True, False])
@pytest.mark.parametrize("rank", [36, 37, 768])
@pytest.mark.parametrize("shape", [(48, 36), (36, 48)])
def test_full_form_from_the_shorter_side_on(keep_base: bool, rank: int, shape: tuple[int, int]) -> None:
    weight = _weight(*shape)
    anchor = Anchor.from_weight(weight, rank, keep_base=keep_base)
    assert anchor.form == "full" and (anchor.rank, anchor.energy) == (36, 1.0)
    assert anchor.left is None and anchor.right is None and anchor.block is None
    assert anchor.base is not None and torch.equal(anchor.base, weight)
    assert anchor.nbytes == weight.nbytes


def test_base_is_small_where_that_is_exact() -> None:
    exact = _weight().bfloat16().float()
    for rank in (4, 36):
        assert Anchor.from_weight(exact, rank).pieces()["base"].dtype == torch.bfloat16
        assert Anchor.from_weight(_weight(), rank).pieces()["base"].dtype == torch.float32


@pytest.mark.parametrize("basis_dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_basis_dtypes(basis_dtype: torch.dtype) -> None:
    weight = _weight(dtype=torch.float64)
    anchor = Anchor.from_weight(weight, 5, basis_dtype=basis_dtype)
    assert anchor.left is not None and anchor.right is not None
    assert anchor.left.dtype == anchor.right.dtype == basis_dtype
    u, _, vh = torch.linalg.svd(weight)
    span = {torch.bfloat16: 2**-8, torch.float32: 1e-6, torch.float64: 1e-12}[basis_dtype]
    for basis, exact in ((anchor.left, u[:, :5]), (anchor.right, vh[:5].T)):
        basis = basis.double()
        assert torch.linalg.matrix_norm(basis - exact @ (exact.T @ basis), 2) < span


@pytest.mark.parametrize("rank", [5, 36])
@pytest.mark.parametrize("keep_base", [True, False])
def test_training_the_weight_leaves_the_anchor_alone(rank: int, keep_base: bool) -> None:
    weight = torch.nn.Parameter(_weight(dtype=torch.bfloat16))
    anchor = Anchor.from_weight(weight, rank, keep_base=keep_base)
    before = {name: piece.clone() for name, piece in anchor.pieces().items()}
    with torch.no_grad():
        weight.add_(1.0)
    for name, piece in anchor.pieces().items():
        assert torch.equal(piece, before[name]) and not piece.requires_grad
        assert piece.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()


@pytest.mark.parametrize("keep_base", [True, False])
def test_strided_weights(keep_base: bool) -> None:
    weight = _weight()
    frame = torch.zeros(48, 50)
    frame[:, 7:43] = weight
    plain = Anchor.from_weight(weight, 6, keep_base=keep_base)
    for strided in (weight.T.contiguous().T, frame[:, 7:43]):
        anchor = Anchor.from_weight(strided, 6, keep_base=keep_base)
        assert all(piece.is_contiguous() for piece in (anchor.base, anchor.block) if piece is not None)
        assert plain.left is not None and anchor.left is not None
        overlap = plain.left.double().T @ anchor.left.double()
        torch.testing.assert_close(overlap, torch.eye(6, dtype=torch.float64), atol=2**-6, rtol=0)
        if keep_base:
            assert anchor.base is not None and torch.equal(anchor.base, weight)


def test_inference_mode_makes_anchors_fit_for_training() -> None:
    with torch.inference_mode():
        anchor = Anchor.from_weight(_weight(), 4, keep_base=False)
    assert not any(piece.is_inference() for piece in anchor.pieces().values())


@pytest.mark.parametrize("keep_base", [True, False])
def test_same_weight_same_bits(keep_base: bool) -> None:
    first, second = (Anchor.from_weight(_weight(), 7, keep_base=keep_base) for _ in range(2))
    assert first.energy == second.energy
    for name, piece in first.pieces().items():
        assert torch.equal(piece, second.pieces()[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rank", "keep_base"), [(5, True), (5, False), (36, True)])
def test_to(device: str, rank: int, keep_base: bool) -> None:
    anchor = Anchor.from_weight(_weight(), rank, keep_base=keep_base)
    assert anchor.to("cpu") is anchor
    moved = anchor.to(device)
    assert moved.device.type == device and moved.form == anchor.form and moved.arithmetic == anchor.arithmetic
    for name, piece in anchor.pieces().items():
        assert torch.equal(moved.pieces()[name].cpu(), piece)
        assert moved.pieces()[name].stride() == piece.stride()


def test_repr_and_identity() -> None:
    anchor = Anchor.from_weight(_weight(), 5)
    text = repr(anchor)
    assert text.startswith("Anchor(form='base', shape=(48, 36), weight_dtype=float32, rank=5, energy=0.")
    assert text.endswith(f"device='cpu', nbytes={anchor.nbytes})")
    assert anchor != Anchor.from_weight(_weight(), 5) and anchor == anchor and hash(anchor) == hash(anchor)
    with pytest.raises(AttributeError):
        anchor.rank = 3  # type: ignore[misc]


def test_rebuilt_block() -> None:
    weight = _weight()
    anchor = Anchor.from_weight(weight, 5, keep_base=False)
    assert anchor.block is not None
    foreign = Anchor(
        **{**anchor.pieces(), "block": anchor.block * 1.001},
        shape=anchor.shape,
        weight_dtype=anchor.weight_dtype,
        rank=5,
        energy=anchor.energy,
        arithmetic="elsewhere",
    )
    rebuilt = foreign.rebuilt_block(torch.nn.Parameter(weight))
    assert rebuilt.block is not None and torch.equal(rebuilt.block, anchor.block)
    assert rebuilt.arithmetic == anchor.arithmetic and foreign.arithmetic == "elsewhere"
    assert not rebuilt.block.requires_grad


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            _weight(36, 48),
            r"weight: got shape \(36, 48\), float32 on cpu, expected \(48, 36\), float32 on cpu",
        ),
        (
            _weight(dtype=torch.bfloat16),
            r"got shape \(48, 36\), bfloat16 on cpu, .* pass the weight that was anchored",
        ),
        (torch.full((48, 36), float("nan")), "weight: got NaN or infinity"),
    ],
)
def test_rebuilt_block_of_another_weight(weight: Tensor, message: str) -> None:
    anchor = Anchor.from_weight(_weight(), 5, keep_base=False)
    with pytest.raises(ValueError, match=message):
        anchor.rebuilt_block(weight)


@pytest.mark.parametrize(("rank", "form"), [(5, "base"), (36, "full")])
def test_rebuilt_block_without_a_block(rank: int, form: str) -> None:
    with pytest.raises(ValueError, match=f"anchor: got the {form} form, expected the block form"):
        Anchor.from_weight(_weight(), rank).rebuilt_block(_weight())


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("a string", "weight: got str, expected a torch.Tensor"),
        (torch.ones(4), r"weight: got 1 dimension\(s\)"),
        (torch.ones(2, 3, 4), r"weight: got 3 dimension\(s\)"),
        (torch.ones(4, 4, dtype=torch.int8), "weight: got dtype torch.int8, expected bfloat16"),
        (torch.ones(4, 4, dtype=torch.complex64), "weight: got dtype torch.complex64"),
        (torch.ones(4, 4).to(torch.float8_e4m3fn), "weight: got dtype torch.float8_e4m3fn"),
        (torch.ones(4, 4).to_sparse(), "weight: got layout torch.sparse_coo"),
        (torch.ones(4, 4, device="meta"), "weight: got a tensor on the meta device"),
        (torch.ones(0, 4), r"weight: got shape \(0, 4\), expected at least one element"),
        (torch.tensor([[1.0, float("nan")]]), "weight: got NaN or infinity"),
        (torch.tensor([[1.0, -float("inf")]]), "weight: got NaN or infinity"),
    ],
)
def test_bad_weights(weight: Any, message: str) -> None:
    for rank in (1, 9):
        with pytest.raises(ValueError, match=message):
            Anchor.from_weight(weight, rank)


@pytest.mark.parametrize("rank", [0, -3, 2.0, "4", None, True])
def test_bad_ranks(rank: Any) -> None:
    with pytest.raises(ValueError, match=r"rank: got .*, expected an int of at least 1"):
        Anchor.from_weight(_weight(), rank)


@pytest.mark.parametrize(
    ("basis_dtype", "message"),
    [
        (torch.float16, "basis_dtype: got float16, expected bfloat16 or float32: .* underflows in float16"),
        (torch.float64, "basis_dtype: got float64 for float32 weights, expected bfloat16 or float32"),
        (torch.int8, "basis_dtype: got torch.int8, expected torch.bfloat16"),
        ("bfloat16", "basis_dtype: got bfloat16, expected torch.bfloat16"),
    ],
)
@pytest.mark.parametrize("rank", [4, 768])
def test_bad_basis_dtypes(basis_dtype: Any, message: str, rank: int) -> None:
    with pytest.raises(ValueError, match=message):
        Anchor.from_weight(_weight(), rank, basis_dtype=basis_dtype)


def _base_arguments(**changes: Any) -> dict[str, Any]:
    given = {
        "left": torch.ones(6, 2),
        "right": torch.ones(4, 2),
        "base": torch.ones(6, 4),
        "shape": (6, 4),
        "weight_dtype": torch.float32,
        "rank": 2,
        "energy": 0.5,
    }
    return {**given, **changes}


def _block_arguments(**changes: Any) -> dict[str, Any]:
    return _base_arguments(**{"base": None, "block": torch.ones(2, 2), "arithmetic": "torch:cpu:float32", **changes})


def test_direct_construction_lays_the_pieces_out() -> None:
    left, right, base = torch.randn(2, 6).T, torch.randn(4, 32)[:, :2], torch.randn(4, 6).T
    anchor = Anchor(**_base_arguments(left=left, right=right, base=base, shape=[6, 4]))
    assert anchor.left is not None and anchor.right is not None and anchor.base is not None
    assert torch.equal(anchor.left, left) and torch.equal(anchor.right, right) and torch.equal(anchor.base, base)
    assert anchor.left.stride() == anchor.right.stride() == (16, 1) and anchor.base.is_contiguous()
    assert anchor.shape == (6, 4) and isinstance(anchor.shape, tuple)
    assert anchor.nbytes == (6 + 4) * 16 * 4 + 6 * 4 * 4
    assert Anchor(**_block_arguments()).form == "block"


def _not_finite(*shape: int) -> Tensor:
    tensor = torch.ones(shape)
    tensor[-1, -1] = float("nan")
    return tensor


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            _base_arguments(left=torch.ones(5, 2)),
            r"left: got shape \(5, 2\), expected \(6, 2\) for a weight of shape",
        ),
        (_base_arguments(left=torch.ones(2, 6)), r"left: got shape \(2, 6\), expected \(6, 2\)"),
        (_base_arguments(right=torch.ones(4, 3)), r"right: got shape \(4, 3\), expected \(4, 2\)"),
        (_base_arguments(base=torch.ones(4, 6)), r"base: got shape \(4, 6\), expected \(6, 4\)"),
        (_block_arguments(block=torch.ones(3, 3)), r"block: got shape \(3, 3\), expected \(2, 2\)"),
        (_base_arguments(left=torch.ones(6)), r"left: got 1 dimension\(s\)"),
        (_base_arguments(left=[[1.0]]), "left: got list, expected a torch.Tensor"),
        (_base_arguments(left=_not_finite(6, 2)), "left: got NaN or infinity"),
        (_base_arguments(right=_not_finite(4, 2)), "right: got NaN or infinity"),
        (_base_arguments(base=_not_finite(6, 4)), "base: got NaN or infinity"),
        (_block_arguments(block=_not_finite(2, 2)), "block: got NaN or infinity"),
        (_base_arguments(left=torch.ones(6, 2).half()), "left: got float16, .* underflows in float16"),
        (_base_arguments(left=torch.ones(6, 2).double()), "left: got float64 for float32 weights"),
        (
            _base_arguments(left=torch.ones(6, 2).bfloat16()),
            "right: got float32, expected bfloat16 like left",
        ),
        (
            _base_arguments(base=torch.ones(6, 4).half()),
            "base: got float16, expected bfloat16 or float32 for float32",
        ),
        (
            _block_arguments(block=torch.ones(2, 2).double()),
            "block: got float64, expected float32 for float32",
        ),
        (
            _block_arguments(weight_dtype=torch.float64),
            "block: got float32, expected float64 for float64 weights",
        ),
        (_base_arguments(base=torch.nn.Parameter(torch.ones(6, 4))), "base: got a tensor that requires grad"),
        (_base_arguments(base=torch.ones(6, 4, device="meta")), "base: got a tensor on the meta device"),
        (_base_arguments(base=None), "anchor: got left, right, expected left, right and base"),
        (_base_arguments(left=None), "anchor: got base, right, expected left, right and base"),
        (_base_arguments(block=torch.ones(2, 2)), "anchor: got base, block, left, right, expected"),
        (_base_arguments(left=None, right=None, base=None), "anchor: got no pieces"),
        (
            _base_arguments(left=None, right=None),
            r"rank: got 2 without left and right, expected min\(6, 4\) = 4",
        ),
        (
            _base_arguments(arithmetic="torch:cpu:float32"),
            "arithmetic: got 'torch:cpu:float32' without a block",
        ),
        (_block_arguments(arithmetic=7), "arithmetic: got 7, expected a str or None"),
        (_base_arguments(rank=5), r"rank: got 5, expected at most min\(6, 4\) = 4"),
        (_base_arguments(rank=0), "rank: got 0, expected an int of at least 1"),
        (_base_arguments(shape=(6, 4, 1)), r"shape: got \(6, 4, 1\), expected \(m, n\)"),
        (_base_arguments(shape=(6, -4)), r"shape: got \(6, -4\), expected \(m, n\)"),
        (_base_arguments(shape=24), r"shape: got 24, expected \(m, n\)"),
        (_base_arguments(energy=1.5), r"energy: got 1.5, expected a number in \[0, 1\]"),
        (_base_arguments(energy=float("nan")), "energy: got nan"),
        (_base_arguments(energy=None), "energy: got None"),
        (_base_arguments(weight_dtype="float32"), "weight_dtype: got 'float32', expected torch.bfloat16"),
        (_base_arguments(weight_dtype=torch.int8), "weight_dtype: got torch.int8"),
    ],
)
def test_direct_construction_refuses(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anchor(**given)
