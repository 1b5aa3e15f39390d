"""C and R of many weights: computed where the parts lie, summed over ranks where they are parts."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .anchor import Anchor
from .fingerprint import content_sum, dtype_name
from .sharding import Exchange, PendingSum, ReplicatedWeight
from .terms import Bucket, Term, buckets_of

_MASK = (1 << 62) - 1
# Contents of the bases of whole anchors, once per anchor.
_contents: weakref.WeakKeyDictionary[Anchor, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Evaluation:
    """R, and for each bucket the C of its weights (k, k), summed over ranks."""

    penalty: Tensor
    drifts: list[list[Tensor]]


def exchanges_of(terms: list[Term]) -> dict[str, Exchange]:
    """One for each group that holds parts of the weights, by its name; the same order on every rank."""
    exchanges: dict[str, Exchange] = {}
    for term in terms:
        group = term.weight.group
        if group is not None and group.group_name not in exchanges:
            exchanges[group.group_name] = Exchange(group, term.weight.device)
    return exchanges


def agree(
    terms: list[Term], exchanges: dict[str, Exchange], call: str, check: Callable[[], None], gradients: bool = False
) -> None:
    """Run ``check`` on every rank and go on only if all ranks pass it and mean the same call.

    Args:
        call: what else must be the same on every rank.
        gradients: gradients are to be added to: refuse where they have been averaged already.

    Raises:
        ValueError: what ``check`` raises; or another rank's check failed, or ranks differ in their anchors.
    """
    failure: ValueError | None = None
    try:
        check()
    except ValueError as error:
        failure = error
    for name, exchange in exchanges.items():
        members = [term for term in terms if term.weight.group is not None and term.weight.group.group_name == name]
        covered = sum(term.weight.part.numel for term in members)
        if exchange.rank == 0:
            covered -= sum(term.weight.shape[0] * term.weight.shape[1] for term in members)
        sample = _gradient_sample(members) if gradients and failure is None else 0
        samples = exchange.agree(_digest(members, call), covered, sample, failure is not None)
        if failure is None and samples[0] and len(set(samples)) == 1:
            failure = ValueError(
                f"{members[0].name}.grad: got gradients that are averaged over ranks already, expected those before "
                "the backward pass that averages them: call accumulate_rotation_grad_ before the last "
                "micro-batch's backward (each rank adds its own weights' share), or put rotation_penalty into the loss"
            )
    if failure is not None:
        raise failure


def _digest(terms: list[Term], call: str) -> int:
    words = [call]
    for term in terms:
        anchor = term.anchor
        dtypes = [f"{name}:{dtype_name(piece.dtype)}" for name, piece in anchor.pieces().items()]
        content = _content(anchor) if anchor.part is None else None
        words.append(
            f"{term.name} {anchor.shape} {anchor.rank} {term.weight.dtype} {dtypes} {anchor.energy!r} {content}"
        )
    return int.from_bytes(hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest(), "little") & _MASK


def _content(anchor: Anchor) -> int:
    found = _contents.get(anchor)
    if found is None:
        bases = [piece for piece in (anchor.left, anchor.right) if piece is not None]
        found = _contents[anchor] = sum(content_sum(basis) for basis in bases) & _MASK
    return found


def _gradient_sample(terms: list[Term]) -> int:
    """Of the smallest gradient that there is, its checksum; 0 where the wrapper knows that none is averaged yet."""
    found = [
        term.weight.parameter.grad
        for term in terms
        if isinstance(term.weight, ReplicatedWeight)
        and term.weight.parameter.grad is not None
        and term.weight.averaged()
    ]
    return content_sum(min(found, key=torch.Tensor.numel)) & _MASK if found else 0


class _Summed(torch.autograd.Function):
    """``local`` replaced by its sum over ranks. Its gradient is the sum's, times ``factor``: each rank's part of W
    reaches R through its own summand alone."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, summed: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad * ctx.factor, None, None


def _summed(local: Tensor, summed: Tensor, factor: float) -> Tensor:
    result: Tensor = _Summed.apply(local, summed, factor)  # type: ignore[no-untyped-call, unused-ignore]
    return result


@dataclass
class _Projected:
    bucket: Bucket
    drifts: list[Tensor]
    squares: Tensor
    flat: Tensor | None = None
    pending: PendingSum | None = None


def evaluate(
    terms: list[Term], exchanges: dict[str, Exchange], into_gradients: bool = False
) -> tuple[list[Bucket], Evaluation]:
    """Project all buckets; each one's C travels while the next is projected.

    Nothing is returned before every sum has arrived and every rank's drifts are known to be finite.

    Raises:
        ValueError: a rank of a group has weights that are not finite.
        RuntimeError: a group failed.
    """
    device = terms[0].weight.device
    projected = []
    for bucket in buckets_of(terms, into_gradients):
        one = _Projected(bucket, *bucket.project())
        if bucket.summed:
            one.flat = torch.cat([drift.reshape(-1) for drift in one.drifts])
            # Summed in place: nothing before it in the graph needs these numbers.
            one.drifts = []
            one.pending = _exchange(bucket, exchanges).start(one.flat.detach())
        projected.append(one)
    parts = [one.squares for one in projected if one.bucket.terms[0].weight.group is None]
    for name, exchange in exchanges.items():
        members = [p for p in projected if _group_name(p.bucket) == name]
        parts += _sums(exchange, members)
    # One concatenation and one sum, in a fixed order.
    total = torch.cat([part.reshape(-1).to(device) for part in parts]).sum()
    return [one.bucket for one in projected], Evaluation(total, [one.drifts for one in projected])


def _group_name(bucket: Bucket) -> str | None:
    group = bucket.terms[0].weight.group
    return None if group is None else group.group_name


def _exchange(bucket: Bucket, exchanges: dict[str, Exchange]) -> Exchange:
    name = _group_name(bucket)
    assert name is not None
    return exchanges[name]


def _sums(exchange: Exchange, members: list[_Projected]) -> list[Tensor]:
    """R of one group's weights, in summands; the drifts of ``members`` become the sums over ranks."""
    own = [one.squares.sum() for one in members if one.pending is None]
    dtype = max((one.squares.dtype for one in members), key=lambda dtype: dtype.itemsize)
    local = torch.stack(own).to(exchange.device, dtype).sum() if own else torch.zeros((), dtype=dtype)
    local = local.to(exchange.device)
    scalars = torch.zeros(1 + exchange.size, dtype=dtype, device=exchange.device)
    scalars[0] = local.detach()
    scalars[1 + exchange.rank] = torch.stack([one.squares.detach().sum().to(exchange.device) for one in members]).sum()
    pending = exchange.start(scalars)
    for one in members:
        if one.pending is not None:
            exchange.finish(one.pending)
    exchange.check_health(exchange.finish(pending)[1:].tolist())
    factor = members[0].bucket.terms[0].weight.factor
    found = [_summed(local, scalars[0], factor)] if own else [scalars[0]]
    for one in members:
        if one.pending is None or one.flat is None:
            continue
        summed = _summed(one.flat, one.pending.tensor, factor)
        found.append(summed.square().sum())
        sizes = [term.anchor.rank for term in one.bucket.terms]
        pieces = torch.split(summed.detach(), [size * size for size in sizes])
        one.drifts = [piece.view(size, size) for piece, size in zip(pieces, sizes, strict=True)]
    return found
