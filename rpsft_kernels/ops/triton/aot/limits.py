"""The resources that one kernel may use of the GPU that it is compiled for.

Builds leave out kernels that exceed them; checks report them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..machine_code.division import CONSUMER_REGISTERS, PRODUCER_REGISTERS
from ..variants import SPECIALISED
from .targets import BY_ARCH, WARP_SIZE

# Warps hand registers over by groups of so many.
_GROUP = 4 * WARP_SIZE


def check_limits(entry: Mapping[str, Any], reserved: int = 1 << 10) -> Iterator[str]:
    """Yield the limits of its GPU that a kernel's entry in a manifest exceeds, in words; none for a good kernel.

    Args:
        entry: ``kernel``, ``arch``, ``registers``, ``spilled``, ``maximal_registers``, ``threads``, ``blocks_per_sm``,
            ``shared``.
        reserved: bytes of shared memory that each block costs a multiprocessor besides its own.
    """
    gpu = BY_ARCH[entry["arch"]]
    registers, threads, blocks = entry["registers"], entry["threads"], entry["blocks_per_sm"]
    shared = entry["shared"]
    if entry["spilled"]:
        yield f"spills {entry['spilled']} bytes a thread into local memory"
    if not 0 < registers <= gpu.thread_registers:
        yield f"{registers} registers a thread, of {gpu.thread_registers}"
    if shared > gpu.block_shared:
        yield f"{shared} bytes of shared memory, of {gpu.block_shared} that a block has"
    if not gpu.is_nvidia:
        return
    if registers > entry["maximal_registers"]:
        yield f"{registers} registers a thread, more than the {entry['maximal_registers']} that it was allowed"
    taken = _GROUP * (2 * CONSUMER_REGISTERS + PRODUCER_REGISTERS)
    if entry["kernel"] in SPECIALISED and registers * threads < taken:
        yield (
            f"hangs: {threads} threads with {registers} registers each start with {registers * threads}, and its "
            f"warps wait until they have {taken}"
        )
    # Warps get registers in steps of 8 a thread.
    held = -(-registers // 8) * 8 * threads * blocks
    if held > gpu.sm_registers:
        yield f"{blocks} resident blocks take {held} registers, of {gpu.sm_registers} of a multiprocessor"
    if (shared + reserved) * blocks > gpu.sm_shared:
        yield (
            f"{blocks} resident blocks take {(shared + reserved) * blocks} bytes of shared memory, of "
            f"{gpu.sm_shared} of a multiprocessor"
        )
    if threads * blocks > gpu.sm_threads:
        yield f"{blocks} resident blocks have {threads * blocks} threads, of {gpu.sm_threads} of a multiprocessor"
