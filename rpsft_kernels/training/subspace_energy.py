"""sum sigma^2: the energy of the pretrained weights inside their anchored subspaces, by which R is made relative."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import ops
from ..anchors.anchor import Anchor
from ..distributed import LocalWeight, find_parameters

# Elements that are squared in float64 at a time.
_CHUNK = 1 << 22


def measure_energy(anchors: Mapping[str, Anchor], model: nn.Module) -> float:
    """Return ``sum ||U^T W0 V||_F^2`` (full anchors: ``||W0||_F^2``) over all anchors, summed in float64.

    Where weights lie over several processes every rank makes this call and gets the same number. It waits for the
    device.
    """
    parameters = find_parameters(model)
    located = {name: parameters[name].locate(name) for name in anchors if name in parameters}
    energies: dict[str, float] = {}
    pending: dict[str, list[str]] = {}
    for name, anchor in anchors.items():
        weight = located.get(name)
        if weight is None or weight.group is None:
            energies[name] = _scale(anchor) * float(_squares(_remaining(anchor)))
        else:
            pending.setdefault(weight.group_name, []).append(name)
    for names in pending.values():
        energies.update(_sum_over_group({name: anchors[name] for name in names}, located[names[0]]))
    # One order on every rank, and no rounding.
    return math.fsum(energies[name] for name in anchors)


def _scale(anchor: Anchor) -> float:
    """Return the share of the squares of the kept piece that lies in the subspaces."""
    return anchor.energy if anchor.form == "base" else 1.0


def _remaining(anchor: Anchor) -> Tensor:
    """Return the piece that tells the energy: B of a block form, else W0."""
    piece = anchor.block if anchor.form == "block" else anchor.base
    assert piece is not None
    return piece


def _squares(piece: Tensor) -> Tensor:
    """Sum the squares of a tensor in float64; a scalar on the CPU or on the tensor's device."""
    total = torch.zeros((), dtype=torch.float64, device=piece.device if ops.has_float64(piece.device) else "cpu")
    for chunk in torch.split(piece.detach().reshape(-1), _CHUNK):
        total += chunk.to(total.device, torch.float64).square().sum()
    return total


def _sum_over_group(anchors: Mapping[str, Anchor], first: LocalWeight) -> dict[str, float]:
    """Return the energy of each weight of one group."""
    group = first.group
    assert group is not None
    leads = group.rank() == 0
    sums = torch.zeros(len(anchors), dtype=torch.float64, device="cpu")
    for i, anchor in enumerate(anchors.values()):
        if anchor.form == "block" and anchor.part is not None:
            # B of a part is a summand of the whole's: squares come after the sum.
            block = torch.zeros(anchor.rank, anchor.rank, dtype=torch.float64, device="cpu")
            if anchor.block is not None and anchor.block.numel():
                block += anchor.block.to("cpu", torch.float64)
            square = _all_reduce(block, first).square().sum()
            sums[i] = square if leads else 0.0
        elif anchor.part is not None or leads:
            # A whole anchor is the same on every rank: one of them counts.
            sums[i] = _scale(anchor) * float(_squares(_remaining(anchor)))
    return dict(zip(anchors, _all_reduce(sums, first).tolist(), strict=True))


def _all_reduce(values: Tensor, weight: LocalWeight) -> Tensor:
    """Sum float64 numbers over the group of a weight, on a device that its traffic can use."""
    carried = values.to(weight.device)
    dist.all_reduce(carried, group=weight.group)
    return carried.cpu()
