"""Drifts pulled back into ``.grad``, a bucket at a time; and its rehearsal, which changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial

import torch
from torch import Tensor

from .. import ops
from .pairing import Bucket, TileOfTerm

_Pull = Callable[[list[int], bool], None]
# What was rehearsed in this process.
_rehearsed: set[tuple[object, ...]] = set()
_MOST = 4096


def accumulate(coeff: float, bucket: Bucket, drifts: list[Tensor]) -> None:
    """Pull a bucket's drifts back into the gradients: added where one exists, written where it is new."""
    for term in bucket.terms:
        if term.weight.requires_grad and not term.weight.shard.numel:
            term.weight.ensure_gradient()
    _each_launch(bucket, partial(_pull, bucket, drifts, coeff))


def rehearse(buckets: Sequence[Bucket], into_gradients: bool) -> None:
    """Raise what the operations on these buckets would raise for want of code that may run, all of them, before the
    first has changed anything. Takes time only where that may be, and once for what is alike.

    Args:
        into_gradients: drifts will be pulled back by :func:`accumulate`; else by a backward pass, where there can be
            one.

    Raises:
        ValueError: what Triton compiles for the GPU may compute wrong numbers.
        RuntimeError: nothing may or can compile what this installation has no kernel for.
    """
    if torch.compiler.is_compiling():
        # Nothing runs now.
        return
    # Weights that have a gradient when a bucket's turn comes, because an earlier one gave it to them.
    given: set[int] = set()
    backward = torch.is_grad_enabled() and not into_gradients
    for bucket in buckets:
        if bucket.backend != "triton" or not ops.may_refuse(bucket.terms[0].weight.device):
            continue
        known = frozenset(given)
        key = (into_gradients, backward, *_kinds(bucket, into_gradients, known))
        given |= {term.weight.identity for term in bucket.terms}
        if key in _rehearsed:
            continue
        with ops.rehearsed(), torch.no_grad():
            drifts, _ = bucket.project()
            if into_gradients:
                _each_launch(bucket, partial(_rehearse_pull, bucket, drifts), known)
            elif backward:
                _rehearse_backward(bucket, drifts)
        if len(_rehearsed) >= _MOST:
            _rehearsed.clear()
        _rehearsed.add(key)


def _kinds(bucket: Bucket, into_gradients: bool, given: Set[int]) -> Iterator[tuple[object, ...]]:
    """Of each term what decides which kernels are launched."""
    places: dict[int, int] = {}
    for term in bucket.terms:
        weight, anchor = term.weight, term.anchor
        dtypes = tuple((name, piece.dtype) for name, piece in anchor.pieces().items())
        gradient: tuple[object, ...] = (weight.requires_grad,)
        if into_gradients and weight.requires_grad:
            held = _layout(weight.gradient()) if weight.must_accumulate else None
            # A weight that is listed twice has its gradient the second time.
            place = places.setdefault(weight.identity, len(places))
            gradient = (held, weight.gradient_dtype, place, weight.identity in given)
        yield anchor.shape, anchor.rank, dtypes, weight.dtype, weight.shard, _layout(weight.values()), gradient


def _layout(matrix: Tensor) -> tuple[object, ...]:
    return matrix.stride(), matrix.data_ptr() % 16


def _each_launch(bucket: Bucket, pull: _Pull, given: Set[int] = frozenset()) -> None:
    """Call ``pull`` with the weights of each launch, by their places, and whether their gradients exist already.
    ``given``: identities of weights that have one whatever they say themselves.
    """
    left = [i for i, term in enumerate(bucket.terms) if term.weight.requires_grad and term.weight.shard.numel]
    while left:
        # A weight that is listed twice has one gradient, which no launch may write twice.
        first = {bucket.terms[i].weight.identity: i for i in reversed(left)}
        members = [i for i in left if first[bucket.terms[i].weight.identity] == i]
        left = [i for i in left if i not in members]
        # One launch serves gradients of one dtype that are all new or all there already.
        kinds: dict[tuple[bool, torch.dtype], list[int]] = {}
        for i in members:
            weight = bucket.terms[i].weight
            exists = weight.must_accumulate or weight.identity in given
            kinds.setdefault((exists, weight.gradient_dtype), []).append(i)
        for (exists, _), alike in kinds.items():
            pull(alike, exists)
        given = given | {bucket.terms[i].weight.identity for i in members}


def _pull(bucket: Bucket, drifts: list[Tensor], coeff: float, members: list[int], exists: bool) -> None:
    terms = [bucket.terms[i] for i in members]
    grads = [term.weight.gradient() for term in terms]
    _pull_into(grads, bucket, drifts, coeff, members, exists)
    for term, grad in zip(terms, grads, strict=True):
        term.weight.write_back(grad)


def _rehearse_pull(bucket: Bucket, drifts: list[Tensor], members: list[int], exists: bool) -> None:
    weights = [bucket.terms[i].weight for i in members]
    # Those that are not there yet are made like their weights.
    grads = [
        weight.gradient() if weight.must_accumulate else torch.empty_like(weight.values(), dtype=weight.gradient_dtype)
        for weight in weights
    ]
    _pull_into(grads, bucket, drifts, 1.0, members, exists)


def _rehearse_backward(bucket: Bucket, drifts: list[Tensor]) -> None:
    """A backward pass makes new gradients. One at a time here: during the forward pass memory is scarce."""
    for i, term in enumerate(bucket.terms):
        if term.weight.requires_grad and term.weight.shard.numel:
            grad = torch.empty_like(term.weight.values(), memory_format=torch.contiguous_format)
            _pull_into([grad], bucket, drifts, 1.0, [i], False)


def _pull_into(
    grads: list[Tensor], bucket: Bucket, drifts: list[Tensor], coeff: float, members: list[int], exists: bool
) -> None:
    terms = [bucket.terms[i] for i in members]
    full = terms[0].anchor.form == "full"
    targets: list[Tensor] = []
    weights: list[Tensor] = []
    pieces: list[TileOfTerm] = []
    chosen: list[Tensor] = []
    scales: list[float] = []
    for i, term, grad in zip(members, terms, grads, strict=True):
        values = [tile.values for tile in term.tiles(term.weight.values())] if full else []
        for j, tile in enumerate(term.tiles(grad)):
            targets.append(tile.values)
            chosen.append(drifts[i])
            scales.append(2.0 * coeff * term.weight.grad_scale)
            pieces.append(tile)
            if full:
                weights.append(values[j])
    # On the CPU whatever the weights' device: a copy from here to a GPU would wait for it.
    factors = torch.tensor(scales, dtype=chosen[0].dtype)
    lefts = [piece.left for piece in pieces if piece.left is not None]
    rights = [piece.right for piece in pieces if piece.right is not None]
    pretrained = [piece.base for piece in pieces if piece.base is not None] if full else []
    operands = ops.Operands(weights, lefts, rights, pretrained)
    ops.pull_back_(targets, operands, chosen, factors, exists, bucket.backend)
