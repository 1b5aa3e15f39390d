"""Sends tensors from rank to rank, for work that is done once: making anchors of weights that no rank holds whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .wire import find_wire


class Transfer:
    """A batch of messages within a group. All ranks must list their messages in one common order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self._operations: list[dist.P2POp] = []
        self._copies: list[tuple[Tensor, Tensor]] = []

    def send(self, tensor: Tensor, member: int) -> None:
        self._add(dist.isend, _view_bytes(tensor.detach().contiguous()).to(self._wire(tensor)), member)

    def receive(self, tensor: Tensor, member: int) -> None:
        """Fill ``tensor``, of any strides, once :meth:`run` has returned."""
        wire = self._wire(tensor)
        buffer = tensor
        if not tensor.is_contiguous() or wire != tensor.device:
            buffer = torch.empty_like(tensor, memory_format=torch.contiguous_format, device=wire)
        if buffer is not tensor:
            self._copies.append((tensor, buffer))
        self._add(dist.irecv, _view_bytes(buffer), member)

    def run(self) -> None:
        if self._operations:
            for work in dist.batch_isend_irecv(self._operations):
                work.wait()
        for tensor, buffer in self._copies:
            tensor.copy_(buffer)

    def _wire(self, tensor: Tensor) -> torch.device:
        return find_wire(self._group, tensor.device)

    def _add(self, operation: object, tensor: Tensor, member: int) -> None:
        if tensor.numel():
            peer = dist.get_global_rank(self._group, member)
            self._operations.append(dist.P2POp(operation, tensor, peer, self._group))  # type: ignore[arg-type]


def _view_bytes(tensor: Tensor) -> Tensor:
    # Backends differ in the dtypes that they send, but all of them send bytes.
    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.view(-1)
