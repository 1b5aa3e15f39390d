"""C and R of many weights: computed where the parts lie, summed over ranks where they are parts."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..anchors.anchor import Anchor
from ..anchors.fingerprint import content_sum
from ..checks import dtype_name
from ..distributed import (
    GroupCall,
    LocalWeight,
    ParameterRef,
    PendingSum,
    ReplicatedWeight,
    find_parameters,
    locate_tensor,
)
from ..distributed.dtensor import is_dtensor
from .accumulation import rehearse
from .pairing import Bucket, Term, buckets_of, paired

_MASK = (1 << 62) - 1
# Contents of the bases of whole anchors, once per anchor.
_contents: weakref.WeakKeyDictionary[Anchor, int] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Prepared:
    """A call that every rank has checked, and in which all ranks agree."""

    terms: list[Term]
    buckets: list[Bucket]
    exchanges: dict[str, GroupCall]


def prepare(
    weights: object,
    anchors: object,
    call: str,
    check: Callable[[list[Term]], None],
    into_gradients: bool = False,
) -> Prepared:
    """Pair weights with anchors and run ``check`` on every rank; go on only if all ranks pass and mean the same call.

    Args:
        call: what else must be the same on every rank.
        check: raises where this rank must refuse.
        into_gradients: gradients are to be added to: refuse where they have been averaged already.

    Raises:
        ValueError: what pairing and ``check`` raise; or another rank refused, or ranks differ in their anchors; or what
            Triton compiles here for the GPU may compute wrong numbers.
    """
    parameters = find_parameters(weights) if isinstance(weights, nn.Module) else None
    # Of all weights, not of those that have anchors: a rank that refuses does so in the groups where others wait.
    exchanges = _exchanges_of(weights, parameters)
    failure: Exception | None = None
    terms: list[Term] = []
    buckets: list[Bucket] = []
    try:
        terms = paired(weights, anchors, parameters)
        check(terms)
        buckets = buckets_of(terms)
        rehearse(buckets, into_gradients)
    except Exception as error:
        if not exchanges:
            raise
        failure = error
    # Ranks of several groups carry a refusal of one into the others: those hear of it the second time at the latest.
    for _ in range(min(2, len(exchanges))):
        for name, exchange in exchanges.items():
            try:
                _agree([] if failure else _of_group(terms, name), buckets, exchange, call, into_gradients, failure)
            except ValueError as error:
                failure = failure or error
    if failure is not None:
        raise failure
    return Prepared(terms, buckets, exchanges)


def _exchanges_of(weights: object, parameters: Mapping[str, ParameterRef] | None) -> dict[str, GroupCall]:
    """One for each group that holds parts of the weights, by its name; the same order on every rank."""
    exchanges: dict[str, GroupCall] = {}
    if not (dist.is_available() and dist.is_initialized()):
        return exchanges
    # Whatever lies on one mesh in one way has one group.
    seen: set[Any] = set()
    for name, tensor, locate in _located(weights, parameters):
        kind = (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else id(tensor)  # type: ignore[attr-defined]
        if kind in seen:
            continue
        seen.add(kind)
        try:
            weight = locate(name)
        except ValueError:
            # Pairing says what is wrong with it, where it has an anchor.
            continue
        if weight.group is not None and weight.group.group_name not in exchanges:
            exchanges[weight.group.group_name] = GroupCall(weight.group, weight.device)
    return exchanges


def _located(
    weights: object, parameters: Mapping[str, ParameterRef] | None
) -> Iterable[tuple[str, Tensor, Callable[[str], LocalWeight]]]:
    """What may lie on several ranks: name, tensor, and how to tell."""
    if parameters is not None:
        for name, found in parameters.items():
            if len(found.shape) == 2 and found.dtype.is_floating_point:
                yield name, found.parameter, found.locate
        return
    for tensor in weights if isinstance(weights, Sequence) else [weights]:
        if isinstance(tensor, Tensor) and is_dtensor(tensor):
            yield "weights", tensor, partial(locate_tensor, tensor)


def _of_group(terms: list[Term], name: str) -> list[Term]:
    return [term for term in terms if term.weight.group is not None and term.weight.group.group_name == name]


def _agree(
    members: list[Term],
    buckets: list[Bucket],
    exchange: GroupCall,
    call: str,
    into_gradients: bool,
    failure: Exception | None,
) -> None:
    if failure is not None:
        exchange.agree(0, {}, failed=True)
        return
    sample = _gradient_sample(members) if into_gradients else 0
    # A weight may be listed under one name only: those of lists are numbered.
    parts = {term.name: term.weight.shard for term in members}
    samples = exchange.agree(_digest(members, buckets, call, into_gradients), parts, sample)
    if samples[0] and len(set(samples)) == 1:
        raise ValueError(
            f"{members[0].name}.grad: got gradients that are averaged over ranks already, expected those before "
            "the backward pass that averages them: call accumulate_rotation_grad_ before the last "
            "micro-batch's backward (each rank adds its own weights' share), or put rotation_penalty into the loss. "
            "Every rank has seen the very same batch? Then they look alike"
        )


def _digest(terms: list[Term], buckets: list[Bucket], call: str, into_gradients: bool) -> int:
    words = [call]
    for term in terms:
        anchor = term.anchor
        dtypes = [f"{name}:{dtype_name(piece.dtype)}" for name, piece in anchor.pieces().items()]
        content = _content(anchor) if anchor.part is None else None
        words.append(
            f"{term.name} {anchor.shape} {anchor.rank} {term.weight.dtype} {dtypes} {anchor.energy!r} {content}"
        )
        if into_gradients:
            words.append(str(term.weight.gradient_dtype if term.weight.requires_grad else None))
    # The pieces that are summed in one go must be the same on every rank.
    mine = {id(term) for term in terms}
    words += [str([t.name for t in b.terms]) for b in buckets if b.summed and id(b.terms[0]) in mine]
    return int.from_bytes(hashlib.blake2b("\n".join(words).encode(), digest_size=8).digest(), "little") & _MASK


def _content(anchor: Anchor) -> int:
    found = _contents.get(anchor)
    if found is None:
        bases = [piece for piece in (anchor.left, anchor.right) if piece is not None]
        found = _contents[anchor] = sum(content_sum(basis) for basis in bases) & _MASK
    return found


def _gradient_sample(terms: list[Term]) -> int:
    """Of the smallest gradient that there is, its checksum: the same on all ranks where they are averaged."""
    found = [
        term.weight.parameter.grad
        for term in terms
        if isinstance(term.weight, ReplicatedWeight) and term.weight.parameter.grad is not None
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


def evaluate(prepared: Prepared, use: Callable[[Bucket, list[Tensor]], None] | None = None) -> Tensor:
    """R. Buckets whose C are sums over ranks are projected first; each one's C travels while the next is projected.

    Args:
        prepared: the call.
        use: called with each bucket and its C (k, k), summed over ranks; for the first time when every sum has arrived
            and every rank's drifts are known to be finite. C of weights that lie whole in this process are
            computed when it is their turn, and dropped.

    Raises:
        ValueError: a rank of a group has weights that are not finite.
        RuntimeError: a group failed.
    """
    shared = []
    for bucket in prepared.buckets:
        if bucket.group_name is None:
            continue
        one = _Projected(bucket, *bucket.project())
        if bucket.summed:
            one.flat = torch.cat([drift.reshape(-1) for drift in one.drifts])
            # Summed in place: nothing before it in the graph needs these numbers.
            one.drifts = []
            one.pending = prepared.exchanges[bucket.group_name].start(one.flat.detach())
        shared.append(one)
    sums = []
    for name, exchange in prepared.exchanges.items():
        members = _of_group_projected(shared, name)
        if members:
            sums.append(_Sums.of(exchange, members, shared))
    for group in sums:
        group.finish()
    # Where one group's ranks refuse, none waits for them in another.
    for group in sums:
        group.exchange.check_health(group.scalars[1:].tolist())
    summands = [summand for group in sums for summand in group.summands()]
    if use is not None:
        for one in shared:
            use(one.bucket, one.drifts)
    squares = [_project_whole(bucket, use) for bucket in prepared.buckets if bucket.group_name is None]
    device = prepared.terms[0].weight.device
    # One concatenation and one sum, in a fixed order.
    return torch.cat([part.reshape(-1).to(device) for part in squares + summands]).sum()


def _project_whole(bucket: Bucket, use: Callable[[Bucket, list[Tensor]], None] | None) -> Tensor:
    """Squares of a bucket that lies whole here; its C are gone before the next bucket's are made."""
    drifts, squares = bucket.project()
    if use is not None:
        use(bucket, drifts)
    return squares


def _of_group_projected(projected: list[_Projected], name: str) -> list[_Projected]:
    return [one for one in projected if one.bucket.group_name == name]


@dataclass
class _Sums:
    """One group's sums on their way."""

    exchange: GroupCall
    members: list[_Projected]
    # R of what each rank computes whole, where there is any.
    local: Tensor | None
    # Summed over ranks: ``local``, then a number of each rank that is finite where its weights are.
    scalars: Tensor
    pending: PendingSum

    @classmethod
    def of(cls, exchange: GroupCall, members: list[_Projected], shared: list[_Projected]) -> _Sums:
        own = [one.squares.sum() for one in members if one.pending is None]
        dtype = max((one.squares.dtype for one in members), key=lambda dtype: dtype.itemsize)
        scalars = torch.zeros(1 + exchange.size, dtype=dtype, device=exchange.device)
        local = None
        if own:
            local = torch.stack(own).to(exchange.device, dtype).sum()
            scalars[0] = local.detach()
        # Of all that this rank computes, so that every group of a rank hears of its NaN.
        seen = [one.squares.detach().sum().to(exchange.device, dtype) for one in shared]
        scalars[1 + exchange.rank] = torch.stack(seen).sum()
        return cls(exchange, members, local, scalars, exchange.start(scalars))

    def finish(self) -> None:
        for one in self.members:
            if one.pending is not None:
                self.exchange.finish(one.pending)
        self.exchange.finish(self.pending)

    def summands(self) -> list[Tensor]:
        """R of the group's weights, in summands; the drifts of ``members`` become the sums over ranks."""
        factor = self.members[0].bucket.terms[0].weight.grad_scale
        found = [self.scalars[0] if self.local is None else _summed(self.local, self.scalars[0], factor)]
        for one in self.members:
            if one.pending is None or one.flat is None:
                continue
            summed = _summed(one.flat, one.pending.tensor, factor)
            found.append(summed.square().sum())
            sizes = [term.anchor.rank for term in one.bucket.terms]
            pieces = torch.split(summed.detach(), [size * size for size in sizes])
            one.drifts = [piece.view(size, size) for piece, size in zip(pieces, sizes, strict=True)]
        return found
