"""Costs of the rotation penalty, from shapes alone: the form of an anchor, FLOPs, and bytes of anchors and of a step.

Every count of the package, its reports and its benchmarks comes from here. Sizes are (m, n) of a weight or (r, c) of a
rectangle of it; ``rank`` is k. The k x k products are counted on the shorter side, which is where they are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Shape = tuple[int, int]

# Rows of U and V start 16-byte aligned in every dtype: GPU loads and tensor descriptors need it.
_ROW_MULTIPLE = 16
_BFLOAT16_BYTES = 2


class _Rectangle(Protocol):
    @property
    def shape(self) -> Shape: ...


class Extent(Protocol):
    """The properties of a shard that its costs depend on: see :class:`rpsft_kernels.distributed.Shard`."""

    @property
    def shape(self) -> Shape: ...
    @property
    def numel(self) -> int: ...
    @property
    def bounds(self) -> _Rectangle: ...
    @property
    def rects(self) -> Sequence[_Rectangle]: ...


def is_full(shape: Shape, rank: int) -> bool:
    """Whether the anchor of a weight (m, n) has the full form, W0 alone: the rank reaches min(m, n)."""
    return rank >= min(shape)


def outer_flops(shape: Shape, rank: int) -> int:
    """FLOPs of one product of an (r, c) matrix with its longer side's basis: the project or the gradient phase."""
    return 2 * shape[0] * shape[1] * rank


def inner_flops(shape: Shape, rank: int) -> int:
    """FLOPs of one k x k product on the shorter side of an (r, c) matrix: the drift or the pull phase."""
    return 2 * rank * rank * min(shape)


def projected_flops(shape: Shape, rank: int) -> int:
    """FLOPs of C and of the gradient of an (r, c) matrix: 4 r c k + 4 k^2 min(r, c)."""
    return 2 * outer_flops(shape, rank) + 2 * inner_flops(shape, rank)


def full_flops(elements: int) -> int:
    """FLOPs of ||W - W0||_F^2 and of its gradient."""
    return 4 * elements


def step_flops(shape: Shape, rank: int) -> int:
    """FLOPs of penalty and gradient of a whole weight (m, n), for the form that its anchor has at this rank."""
    return full_flops(shape[0] * shape[1]) if is_full(shape, rank) else projected_flops(shape, rank)


def adapted_flops(shape: Shape, rank: int, adapter_rank: int) -> int:
    """FLOPs of penalty and gradients of a weight (m, n) that an adapter of rank r moves: ``W + s B A``.

    Images of B and A, and gradients from coefficients, take 4 k r (m + n); in the full form, whose bases are left out,
    the factors stand for their images. The products of small matrices take 4 r^2 times the columns of both images.
    """
    rows, columns = shape
    if is_full(shape, rank):
        return 4 * adapter_rank**2 * (rows + columns)
    return 4 * rank * adapter_rank * (rows + columns) + 4 * adapter_rank**2 * 2 * rank


def adapted_bytes(shape: Shape, rank: int, adapter_rank: int, basis_bytes: int = _BFLOAT16_BYTES) -> int:
    """Bytes that a step moves for such a weight: U and V twice, float32 factors once and their gradients twice."""
    factors = 3 * 4 * adapter_rank * sum(shape)
    return factors if is_full(shape, rank) else factors + 2 * sum(shape) * padded_columns(rank) * basis_bytes


def shard_flops(shard: Extent, rank: int) -> int:
    """FLOPs of penalty and gradient of a shard, rectangle by rectangle."""
    if is_full(shard.shape, rank):
        return full_flops(shard.numel)
    return sum(projected_flops(rect.shape, rank) for rect in shard.rects)


def drift_bytes(rank: int) -> int:
    """Bytes of one C or B (k, k) in float32, which all but float64 weights have."""
    return 4 * rank * rank


def padded_columns(rank: int) -> int:
    """Elements from one row of U or V to the next: k rounded up to a multiple of 16."""
    return -(-rank // _ROW_MULTIPLE) * _ROW_MULTIPLE


def subspace_bytes(shard: Extent, rank: int, element_bytes: int = _BFLOAT16_BYTES) -> int:
    """Bytes of the shard's rows of U and V, their padding included; 0 in the full form."""
    if is_full(shard.shape, rank):
        return 0
    return sum(shard.bounds.shape) * padded_columns(rank) * element_bytes


def kept_bytes(shard: Extent, rank: int, keep_base: bool, base_bytes: int = _BFLOAT16_BYTES) -> int:
    """Bytes of W0 (``base_bytes`` an element) or of the block that a shard's anchor keeps: in float32, or in float64
    for weights of 8 bytes an element.
    """
    if keep_base or is_full(shard.shape, rank):
        return shard.numel * base_bytes
    return drift_bytes(rank) * (2 if base_bytes == 8 else 1) if shard.numel else 0


def anchor_bytes(
    shard: Extent,
    rank: int,
    keep_base: bool,
    basis_bytes: int = _BFLOAT16_BYTES,
    base_bytes: int = _BFLOAT16_BYTES,
) -> int:
    """Bytes of a shard's anchor, as ``Anchor.nbytes`` counts them.

    Args:
        shard: the elements of the weight that the anchor belongs to.
        rank: k; from min(m, n) on the anchor has the full form.
        keep_base: base form (True) or block form.
        basis_bytes: bytes of an element of U and V.
        base_bytes: bytes of an element of W0.
    """
    return subspace_bytes(shard, rank, basis_bytes) + kept_bytes(shard, rank, keep_base, base_bytes)


def step_bytes(shard: Extent, rank: int, keep_base: bool) -> int:
    """Bytes that a step moves for a bfloat16 shard: its elements, and U and V read twice. C and B are left out.

    W and W0 of a full anchor are read for R and again for the gradient, those of the other forms once.
    """
    if is_full(shard.shape, rank):
        return elementwise_bytes(shard.numel, _BFLOAT16_BYTES, base_reads=2, weight_reads=2)
    return elementwise_bytes(shard.numel, _BFLOAT16_BYTES, base_reads=int(keep_base)) + 2 * subspace_bytes(shard, rank)


def elementwise_bytes(elements: int, weight_bytes: int, base_reads: int, weight_reads: int = 1) -> int:
    """Bytes that a step moves of W, W0 and the gradient.

    Args:
        elements: number of the weight's elements that are worked on.
        weight_bytes: bytes of an element of the weight and of its gradient, which is read and written.
        base_reads: number of times that W0, in bfloat16, is read.
        weight_reads: number of times that W is read.
    """
    return elements * ((weight_reads + 2) * weight_bytes + base_reads * _BFLOAT16_BYTES)


# Columns that a tile of T = W V sums up at most.
_LONGEST_SUM = 1 << 15


def stretches_of(cols: int) -> int:
    """The number of stretches of columns that the sum ``W V`` is cut into.

    A vocabulary is wide, and its few tiles would keep a few programs busy when all others have ended. A function of the
    shape alone: the bits of C must not depend on which weights share the launch.
    """
    return max(1, -(-cols // _LONGEST_SUM))
