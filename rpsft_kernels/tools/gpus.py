"""Data sheets of the GPUs that predictions are made for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A data sheet: dense bfloat16 FLOP/s of the tensor cores, and bytes per second of DRAM and of the link, one way.

    ``architecture`` and ``multiprocessors`` choose the tile table and the schedule, hence the launches.
    """

    name: str
    architecture: str
    multiprocessors: int
    tensor: float
    dram: float
    link: float


# The vendors' data-sheet figures (NVIDIA A100 80GB, H100, H200 in SXM form, B200; AMD MI300X), without sparsity. Links
# (NVLink, Infinity Fabric) count half of the bidirectional sum.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "sm_80", 108, tensor=312e12, dram=2.039e12, link=300e9),
        Gpu("h100", "sm_90", 132, tensor=989e12, dram=3.35e12, link=450e9),
        Gpu("h200", "sm_90", 132, tensor=989e12, dram=4.8e12, link=450e9),
        Gpu("b200", "sm_100", 148, tensor=2250e12, dram=8.0e12, link=900e9),
        Gpu("mi300x", "gfx942", 304, tensor=1307e12, dram=5.3e12, link=448e9),
    )
}
