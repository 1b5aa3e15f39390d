"""DTensor: the weights of FSDP2 and tensor parallelism, and their meshes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..private_names import flat_mesh, fsdp2_parameters, shards_before
from .shard import Shard, Span
from .weight import LocalWeight

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: object) -> bool:
    # torch.distributed.tensor is not imported for this, as that takes a while.
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


@dataclass(frozen=True)
class DTensorWeight(LocalWeight):
    """A DTensor parameter, of which rows or columns lie here."""

    def _local(self, tensor: Any) -> Tensor:
        local: Tensor = tensor.to_local()
        if hasattr(local, "wait"):
            # A redistribution that is still on its way has no memory of its own.
            local = local.wait()
        # An empty shard may have another shape, which depends on its maker.
        return local if self.shard.numel else local.reshape(self.shard.local_shape)

    def values(self) -> Tensor:
        return self._local(self.parameter)

    def state(self) -> tuple[object, ...]:
        # A weak reference, because the mesh itself would be kept alive.
        return *super().state(), self._dtensor.placements, weakref.ref(self._dtensor.device_mesh)

    def check_gradient(self, name: str) -> None:
        grad: Any = self.parameter.grad
        if grad is not None:
            placements = getattr(grad, "placements", None)
            if placements != self._dtensor.placements:
                raise ValueError(
                    f"{name}.grad: got placements {placements}, expected {self._dtensor.placements} like the "
                    "parameter's; redistribute the gradient first"
                )
        super().check_gradient(name)

    @property
    def _dtensor(self) -> DTensor:
        return self.parameter  # type: ignore[return-value]

    @torch.no_grad()
    def gradient(self) -> Tensor:
        if self.parameter.grad is None:
            # DTensor.from_local would move shards on the CPU (FSDP2's CPU offload) to the mesh's GPU.
            self.parameter.grad = torch.empty_like(self.parameter, dtype=self.gradient_dtype)
        return self._local(self.parameter.grad)

    def ensure_gradient(self) -> None:
        # Norms of gradients are collective: every rank must have the same gradients.
        self.gradient()


def locate_dtensor(tensor: Tensor, name: str) -> DTensorWeight:
    """Locate the shard of a DTensor (m, n) that lies here.

    Raises:
        ValueError: its placements are not shards and replicas, or its local tensor is not what they say.
    """
    dtensor: DTensor = tensor  # type: ignore[assignment]
    shape, placements, mesh = tuple(dtensor.shape), dtensor.placements, dtensor.device_mesh
    if any(placement.is_partial() for placement in placements):
        raise ValueError(f"{name}: got placements {placements}, expected shards and replicas; redistribute it first")
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ValueError(f"{name}: got a DTensor on a mesh without this rank, expected one that includes it")
    sizes = list(mesh.shape)
    split = [i for i, placement in enumerate(placements) if not placement.is_replicate() and sizes[i] > 1]
    rows, cols = shard_spans(shape, placements, sizes, coordinate)
    if not split:
        shard, group = Shard.whole(shape), None  # type: ignore[arg-type]
    else:
        shard, group = Shard.rectangle(shape, rows, cols), _group(mesh, split)  # type: ignore[arg-type]
    with torch.no_grad():
        local = dtensor.to_local()
    if local.numel() != shard.numel or (shard.numel and tuple(local.shape) != shard.local_shape):
        raise ValueError(
            f"{name}: got a local tensor of shape {tuple(local.shape)}, expected {shard.local_shape} for placements "
            f"{placements} of {shape} on a mesh of {tuple(sizes)}"
        )
    return DTensorWeight(tensor, shape, shard, group)


def shard_spans(
    shape: Sequence[int], placements: Sequence[Any], sizes: Sequence[int], coordinate: Sequence[int]
) -> tuple[Span, Span]:
    """Return the rows and columns of an (m, n) tensor at ``coordinate`` of a mesh of ``sizes``.

    Where several mesh dimensions split one dimension, the one with the fewest shards before it cuts first (tensor
    parallelism before FSDP2). Each cut makes chunks of the rounded-up size; the last ones are smaller or empty.
    """
    spans = [(0, shape[0]), (0, shape[1])]
    cuts = [(shards_before(p), i) for i, p in enumerate(placements) if not p.is_replicate()]
    for _, i in sorted(cuts):
        dim = placements[i].dim % 2
        begin, end = spans[dim]
        chunk = -(-(end - begin) // sizes[i])
        spans[dim] = (min(end, begin + chunk * coordinate[i]), min(end, begin + chunk * (coordinate[i] + 1)))
    return spans[0], spans[1]


def _group(mesh: Any, split: list[int]) -> ProcessGroup:
    if len(split) == 1:
        return mesh.get_group(split[0])  # type: ignore[no-any-return]
    names = mesh.mesh_dim_names
    if names is None:
        raise ValueError(
            f"device_mesh: got {mesh} without names, expected mesh_dim_names: C is summed over {len(split)} of its "
            "dimensions at once"
        )
    # torch makes the flattened mesh once, and finds it again under its name.
    chosen = mesh if len(split) == mesh.ndim else mesh[tuple(names[i] for i in split)]
    return flat_mesh(chosen).get_group()  # type: ignore[no-any-return]


def gathered_by_fsdp2(model: nn.Module) -> Iterator[tuple[Tensor, nn.Parameter]]:
    """Yield (parameter that a module shows now, the sharded one) wherever FSDP2 shows another than the sharded one.

    Between a forward pass and its backward pass, modules that do not reshard show whole parameters, as the root does.
    """
    for module in model.modules():
        for shown, sharded in fsdp2_parameters(module):
            if shown is not sharded:
                yield shown, sharded
