"""What one kernel may use of the GPU that it is compiled for. Builds refuse what exceeds it; checks report it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_KIB = 1 << 10


class Limits(NamedTuple):
    """Registers a thread and a multiprocessor have, bytes of shared memory a block and a multiprocessor have, threads
    that a multiprocessor runs at a time.
    """

    thread_registers: int
    registers: int
    block_shared: int
    shared: int
    threads: int


def _nvidia(block_shared: int, threads: int) -> Limits:
    # Of its shared memory a multiprocessor keeps 1 KiB of every block for the system: one block cannot have it all.
    return Limits(255, 64 * _KIB, block_shared * _KIB, (block_shared + 1) * _KIB, threads)


# By compute capability without the dot: the programming guide's table of technical specifications.
_NVIDIA = {
    80: _nvidia(163, 2048), 86: _nvidia(99, 1536), 87: _nvidia(163, 1536), 89: _nvidia(99, 1536),
    90: _nvidia(227, 2048), 100: _nvidia(227, 2048), 103: _nvidia(227, 2048),
    120: _nvidia(99, 1536), 121: _nvidia(99, 1536),
}  # fmt: skip
_AMD = {"gfx942": Limits(512, 4 * 64 * 512, 64 * _KIB, 64 * _KIB, 2048)}


def limits(arch: str) -> Limits:
    """Of an architecture by its name in a manifest, such as ``sm_90a``."""
    return _AMD[arch] if arch in _AMD else _NVIDIA[int(arch.removeprefix("sm_").rstrip("a"))]


def exceeded(entry: Mapping[str, Any], reserved: int = _KIB) -> Iterator[str]:
    """What a kernel's entry in a manifest says of itself that its GPU has not: nothing, of a good one.

    Args:
        entry: ``arch``, ``registers``, ``spilled``, ``maximal_registers``, ``threads``, ``residents``, ``shared``.
        reserved: bytes of shared memory that each block costs a multiprocessor beside its own.
    """
    bound = limits(entry["arch"])
    registers, threads, residents = entry["registers"], entry["threads"], entry["residents"]
    shared = entry["shared"]
    if entry["spilled"]:
        yield f"spills {entry['spilled']} bytes a thread into local memory"
    if not 0 < registers <= bound.thread_registers:
        yield f"{registers} registers a thread, of {bound.thread_registers}"
    if shared > bound.block_shared:
        yield f"{shared} bytes of shared memory, of {bound.block_shared} that a block has"
    if entry["arch"] in _AMD:
        return
    if registers > entry["maximal_registers"]:
        yield f"{registers} registers a thread, more than the {entry['maximal_registers']} that it was allowed"
    # Warps get registers in steps of 8 a thread.
    held = -(-registers // 8) * 8 * threads * residents
    if held > bound.registers:
        yield f"{residents} resident blocks take {held} registers, of {bound.registers} of a multiprocessor"
    if (shared + reserved) * residents > bound.shared:
        yield (
            f"{residents} resident blocks take {(shared + reserved) * residents} bytes of shared memory, of "
            f"{bound.shared} of a multiprocessor"
        )
    if threads * residents > bound.threads:
        yield f"{residents} resident blocks have {threads * residents} threads, of {bound.threads} of a multiprocessor"
