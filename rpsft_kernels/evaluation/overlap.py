"""Whether matrices share memory. Gradients are added to in place, so that each element needs memory of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements of a tensor of up to two dimensions share memory."""
    if tensor.is_contiguous():
        return False
    steps = [(size, stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    if not all(size for size, _ in steps):
        return False
    if len(steps) != 2:
        return any(stride == 0 for _, stride in steps)
    (rows, down), (cols, across) = steps
    # Elements (i, j) and (i + across / common, j - down / common) share memory, and none that are nearer do.
    common = math.gcd(down, across)
    return common == 0 or (across // common < rows and down // common < cols)


def lie_apart(tensors: Sequence[Tensor]) -> bool:
    """Whether each of a device's tensors ends before the next one begins: none can share memory with another."""
    if not all(map(Tensor.is_contiguous, tensors)):
        spans = sorted(map(_span, tensors))
    else:
        spans = sorted([(begin := tensor.data_ptr(), begin + tensor.nbytes) for tensor in tensors])
    return all(end <= begin for (_, end), (begin, _) in pairwise(spans))


def find_overlap(tensors: Sequence[Tensor]) -> tuple[int, int] | None:
    """Find two tensors of one device that share memory, of such as do not overlap themselves; None if none do."""
    spans = sorted((*_span(tensor), i) for i, tensor in enumerate(tensors))
    for cluster in _clusters(spans):
        # Spans that overlap may belong to views that do not, such as the columns of one buffer.
        members = [i for _, _, i in cluster]
        memory = _Memory([tensors[i] for i in members])
        for count, i in enumerate(members):
            if memory.take(tensors[i]):
                continue
            memory.free()
            memory.take(tensors[i])
            other = next(other for other in members[:count] if not memory.take(tensors[other]))
            return min(i, other), max(i, other)
    return None


class _Memory:
    """Marks for the memory that some tensors lie in, in units that make up their elements; all free at first."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        spans = list(map(_span, tensors))
        self._start = min(begin for begin, _ in spans)
        sizes = [tensor.element_size() for tensor in tensors]
        self._unit = math.gcd(*sizes, *(begin - self._start for begin, _ in spans))
        self._taken = torch.zeros(
            (max(end for _, end in spans) - self._start) // self._unit, dtype=torch.bool, device="cpu"
        )

    def take(self, tensor: Tensor) -> bool:
        """Mark a tensor's elements; False if one of them was marked."""
        units = tensor.element_size() // self._unit
        begin = (tensor.data_ptr() - self._start) // self._unit
        strides = [stride * units for stride in tensor.stride()]
        own = self._taken.as_strided((*tensor.shape, units), (*strides, 1), begin)
        free = not own.any()
        own.fill_(True)
        return free

    def free(self) -> None:
        self._taken.zero_()


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses where a tensor begins and ends."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.numel() * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _clusters(spans: Sequence[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Yield the groups of two or more sorted spans that overlap each other, each directly or through others."""
    cluster: list[tuple[int, int, int]] = []
    stop = 0
    for span in spans:
        if cluster and span[0] >= stop:
            if len(cluster) > 1:
                yield cluster
            cluster = []
        cluster.append(span)
        stop = max(stop, span[1]) if len(cluster) > 1 else span[1]
    if len(cluster) > 1:
        yield cluster
