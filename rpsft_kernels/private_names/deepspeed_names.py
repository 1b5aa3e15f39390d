"""Reads DeepSpeed's private names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .table import TABLE, read, spellings

(_link,) = spellings["linked parameter", "link to the optimizer's part of it"]
_LINK = _link.name


def averaging_group(engine: nn.Module) -> Any:
    """Return the ranks over which a DeepSpeedEngine averages gradients."""
    return read(engine, "DeepSpeedEngine", "ranks that average gradients")


def is_linked_by_deepspeed(parameter: Tensor) -> bool:
    """Whether an optimizer of DeepSpeed keeps the parameter's gradient to itself."""
    return hasattr(parameter, _LINK)


@dataclass(frozen=True, eq=False)
class MasterRange:
    """The elements of a replicated parameter that this rank's optimizer trains, as float32 masters.

    Attributes:
        begin: the first of these elements, in row-major order.
        end: the one after the last; ``begin`` where the masters of all elements are other ranks'.
        undivided: whether one rank, this or another, has the masters of all elements.
        division: where the parameter begins in the buffer that ranks divide, and how much of that each of them has.
        masters: float32, of ``end - begin`` elements.
    """

    begin: int
    end: int
    undivided: bool
    division: tuple[int, int]
    masters: Tensor


def find_master_range(engine: Any, parameter: Tensor, group: Any) -> MasterRange | None:
    """Find the masters that a DeepSpeedEngine's optimizer (ZeRO-1 and 2, BF16_Optimizer) keeps of a parameter.

    None where they are not at hand, the same on every rank: of a parameter that this optimizer does not train, with
    masters in 16 bits, where other ranks than ``group`` divide them, and with an optimizer that is offloaded, whose
    masters lie on the CPU.

    Args:
        engine: the engine.
        parameter: in 16 bits.
        group: the ranks that hold the parameter; None for this one alone.
    """
    optimizer = engine.optimizer
    if optimizer is None or not is_linked_by_deepspeed(parameter) or not parameter.is_contiguous():
        return None
    (row,) = spellings["DeepSpeedZeroOptimizer", "masters of each group, flat, of this rank"]
    kind = "DeepSpeedZeroOptimizer" if hasattr(optimizer, row.name) else "BF16_Optimizer"
    if kind == "DeepSpeedZeroOptimizer" and read(optimizer, kind, "whether it is on the CPU"):
        return None
    all_masters = read(optimizer, kind, "masters of each group, flat, of this rank")
    # DeepSpeed's own link of a parameter to its masters takes the order in which parameters came, and they may lie in
    # another one: where they lie says which masters are theirs, and that this optimizer trains them.
    memory = parameter.untyped_storage().data_ptr()
    for i, flat in enumerate(read(optimizer, kind, "parameters of each group, flat")):
        if not memory or flat.untyped_storage().data_ptr() != memory:
            continue
        ranks, masters = read(optimizer, kind, "ranks that divide each group")[i], all_masters[i].detach()
        # engine.offload_states moves masters away for a while.
        at_hand = masters.dtype == torch.float32 and masters.device == parameter.device
        if not at_hand or not _are_same(ranks, group) or masters.numel() * ranks.size() != flat.numel():
            return None
        first, length, count = parameter.storage_offset() - flat.storage_offset(), masters.numel(), parameter.numel()
        start = length * ranks.rank()
        begin, end = (min(max(edge - first, 0), count) for edge in (start, start + length))
        return MasterRange(
            begin=begin,
            end=end,
            undivided=first // length == (first + count - 1) // length,
            division=(first, length),
            masters=masters.narrow(0, first + begin - start if begin < end else 0, end - begin),
        )
    return None


def _are_same(ranks: Any, group: Any) -> bool:
    if group is None:
        return int(ranks.size()) == 1
    return ranks is group or dist.get_process_group_ranks(ranks) == dist.get_process_group_ranks(group)


@dataclass(frozen=True, eq=False)
class Zero3Parameter:
    """The attributes that DeepSpeed ZeRO-3 sets on a parameter that it has partitioned."""

    parameter: Tensor

    @staticmethod
    def of(parameter: Tensor) -> Zero3Parameter | None:
        """Return None for a parameter that ZeRO-3 has not partitioned."""
        # Any of its marks decides: where another is missing, reading that one raises.
        rows = [row for row in TABLE if row.holder == "ZeRO-3 parameter" and row.name.startswith("ds_")]
        return Zero3Parameter(parameter) if any(hasattr(parameter, row.name) for row in rows) else None

    def _read(self, meaning: str) -> Any:
        return read(self.parameter, "ZeRO-3 parameter", meaning)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._read("shape of the whole"))

    @property
    def numel(self) -> int:
        return int(self._read("number of elements of the whole"))

    @property
    def group(self) -> Any:
        return self._read("ranks that hold it")

    @property
    def partition(self) -> Tensor:
        """This rank's elements; the last ranks' are padded."""
        partition: Tensor = self._read("partition")
        return partition

    @property
    def partition_numel(self) -> int:
        return int(read(self.partition, "ZeRO-3 partition", "number of elements"))

    @property
    def has_optimizer(self) -> bool:
        """Whether deepspeed.initialize has given it an optimizer."""
        (row,) = spellings["ZeRO-3 parameter", "optimizer"]
        return hasattr(self.parameter, row.name)

    def _optimizer(self, meaning: str) -> Any:
        return read(self._read("optimizer"), "DeepSpeedZeroOptimizer_Stage3", meaning)

    @property
    def loss_scale(self) -> float:
        """Factor that gradients in float16 are multiplied by until the step."""
        if not self.has_optimizer:
            return 1.0
        return float(self._optimizer("what gradients are multiplied by"))

    @property
    def master(self) -> Tensor | None:
        """This rank's elements as the optimizer trains them in float32, padded as :attr:`partition` is.

        None where there are none, or where they are not at hand: of a parameter that was frozen when the optimizer was
        made, with masters in 16 bits, and with an optimizer that is offloaded, whose masters lie on the CPU or on a
        disk, and may be changing while they are read.
        """
        if not self.has_optimizer or self._optimizer("whether it is on the CPU"):
            return None
        positions = self._optimizer("group, first element and number of elements in it of each trained parameter")
        key = self._optimizer("key of a parameter among trained ones")(self.parameter)
        if key not in positions:
            return None
        group, begin, count = positions[key]
        flat: Tensor = self._optimizer("masters of each group, flat")[group].detach()
        partition = self.partition
        # engine.offload_states moves masters away for a while.
        if flat.dtype != torch.float32 or flat.device != partition.device or count != partition.numel():
            return None
        return flat.narrow(0, begin, count)

    @property
    def has_gradient(self) -> bool:
        """Whether this step's backward passes gave it a gradient; else the last step's is still in its place."""
        return self._read("identity") in self._optimizer("parameters with a gradient in this step")

    def mark_gradient(self) -> None:
        """Record that it has a gradient now."""
        self._optimizer("parameters with a gradient in this step").add(self._read("identity"))

    @property
    def ready(self) -> bool:
        """Whether gradients lie where the next step takes them; the next backward pass would write over any others."""
        if self._optimizer("whether it is on the CPU"):
            # On the CPU gradients come with the last micro-batch.
            seen = (
                self._optimizer("whether a backward pass has ended") or self._optimizer("number of the micro-batch") > 0
            )
            return bool(seen and self._optimizer("whether the micro-batch is the last of its step")())
        return bool(self._optimizer("averaged gradients"))
