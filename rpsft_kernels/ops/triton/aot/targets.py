"""The GPU generations that kernels are compiled for, one row each, and lists of architectures as users write them.

To add a GPU, add a row to ``GENERATIONS``; where no older tile table suits it, add ``tiles/<architecture>.json`` as
well. Everything else the package knows about a generation is derived from its row.

This file needs only the standard library: setup.py imports it where torch is not installed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

_KIB = 1 << 10
# The same on every NVIDIA GPU since Kepler: registers of a thread and of a multiprocessor, threads of a warp.
THREAD_REGISTERS = 255
SM_REGISTERS = 64 * _KIB
WARP_SIZE = 32
# GPUs that appear in the lists of containers and that no kernel is compiled for. They are skipped with a note, because
# refusing them would break installations that only inherit such a list.
_TOO_OLD = (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75)
_UNTRIED = (88, 110)
# Tegra GPUs without a row: see ``Generation.tegra``.
_OTHER_TEGRA = (72, 101, 110)


class Compatibility(Enum):
    """How the code of one architecture runs on a device; listed from best to worst."""

    EXACT = "exact"
    SAME_MAJOR = "compatible"
    PTX = "ptx"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One GPU architecture.

    Attributes:
        architecture: Triton's name of it, such as ``"sm_90"``.
        arch: what its machine code is for; ``"sm_90a"`` is for 9.0 alone.
        capability: the compute capability without its dot (90 for 9.0); 0 for AMD.
        table: the tile table that serves it; ``architecture`` where it has its own.
        descriptors: whether aligned operands are read through tensor descriptors.
        block_shared, sm_shared: bytes of shared memory that a block can have, and that a multiprocessor has.
        sm_threads: threads that a multiprocessor can run at a time.
        thread_registers, sm_registers: 32-bit registers that a thread can have, and that a multiprocessor has.
        warp_size: threads of a warp.
        ptx_version: the PTX version to write (80 for 8.0), or None for the newest that Triton's assembler knows.
        tegra: NVIDIA promises no binary compatibility between a Tegra GPU and any other.
        asynchronous_products: a matrix product goes on after its instruction and uses registers meanwhile, so the
            machine code must be scanned (``machine_code.register_hazards``).
        computed_operand_in_shared: the tensor core takes an operand that the kernel computes from shared memory.
        elf_machine: the machine number in the flags of an ELF file for AMD; 0 for NVIDIA.
    """

    architecture: str
    arch: str
    capability: int = 0
    table: str
    descriptors: bool
    block_shared: int
    sm_shared: int
    sm_threads: int
    thread_registers: int = THREAD_REGISTERS
    sm_registers: int = SM_REGISTERS
    warp_size: int = WARP_SIZE
    ptx_version: int | None = None
    tegra: bool = False
    asynchronous_products: bool = False
    computed_operand_in_shared: bool = False
    elf_machine: int = 0

    @property
    def is_nvidia(self) -> bool:
        """Whether this package's own launcher can start its code."""
        return self.capability > 0

    @property
    def specific(self) -> bool:
        """Whether its machine code and PTX run on this architecture alone."""
        return self.arch != self.architecture

    @property
    def dotted(self) -> str:
        """The compute capability as NVIDIA writes it, such as ``"9.0"``."""
        return format_capability(self.capability)

    @property
    def triton_target(self) -> tuple[str, int | str, int]:
        """The arguments of ``triton.backends.compiler.GPUTarget``."""
        return ("cuda", self.capability, self.warp_size) if self.is_nvidia else ("hip", self.arch, self.warp_size)

    def cubin_compatibility(self, capability: int) -> Compatibility | None:
        """How its machine code runs on an NVIDIA device of this compute capability; None if it does not."""
        if self.capability == capability:
            return Compatibility.EXACT
        if self.specific or self.tegra or capability in _TEGRA:
            return None
        same_major = self.capability // 10 == capability // 10
        return Compatibility.SAME_MAJOR if same_major and self.capability < capability else None

    def ptx_compatibility(self, capability: int) -> Compatibility | None:
        """How its PTX runs on an NVIDIA device of this compute capability; None if it does not."""
        runs = self.capability == capability or (self.capability < capability and not self.specific)
        return Compatibility.PTX if runs else None


def _nvidia(
    capability: int,
    *,
    table: int,
    block_kib: int,
    sm_threads: int,
    arch_suffix: str = "",
    descriptors: bool = False,
    ptx_version: int | None = None,
    tegra: bool = False,
    asynchronous_products: bool = False,
    computed_operand_in_shared: bool = False,
) -> Generation:
    return Generation(
        architecture=f"sm_{capability}",
        arch=f"sm_{capability}{arch_suffix}",
        capability=capability,
        table=f"sm_{table}",
        descriptors=descriptors,
        block_shared=block_kib * _KIB,
        # A multiprocessor keeps 1 KiB of its shared memory for the system for each block, so one block cannot have all.
        sm_shared=(block_kib + 1) * _KIB,
        sm_threads=sm_threads,
        ptx_version=ptx_version,
        tegra=tegra,
        asynchronous_products=asynchronous_products,
        computed_operand_in_shared=computed_operand_in_shared,
    )


# Shared memory and threads: the programming guide's table of technical specifications. PTX for 8.x serves newer GPUs
# too, so it is kept at version 8.0, which every driver of CUDA 12 and newer reads. Triton compiles 9.0 and newer for
# that architecture alone, hence their suffix.
GENERATIONS = (
    _nvidia(80, table=80, block_kib=163, sm_threads=2048, ptx_version=80),
    _nvidia(86, table=86, block_kib=99, sm_threads=1536, ptx_version=80),
    _nvidia(87, table=86, block_kib=163, sm_threads=1536, ptx_version=80, tegra=True),
    _nvidia(89, table=86, block_kib=99, sm_threads=1536, ptx_version=80),
    _nvidia(
        90, table=90, block_kib=227, sm_threads=2048, arch_suffix="a", descriptors=True, asynchronous_products=True
    ),
    _nvidia(
        100,
        table=100,
        block_kib=227,
        sm_threads=2048,
        arch_suffix="a",
        descriptors=True,
        computed_operand_in_shared=True,
    ),
    _nvidia(
        103,
        table=100,
        block_kib=227,
        sm_threads=2048,
        arch_suffix="a",
        descriptors=True,
        computed_operand_in_shared=True,
    ),
    _nvidia(120, table=120, block_kib=99, sm_threads=1536, arch_suffix="a", descriptors=True),
    _nvidia(121, table=120, block_kib=99, sm_threads=1536, arch_suffix="a", descriptors=True),
    Generation(
        architecture="gfx942",
        arch="gfx942",
        table="gfx942",
        descriptors=False,
        block_shared=64 * _KIB,
        sm_shared=64 * _KIB,
        sm_threads=2048,
        thread_registers=512,
        sm_registers=4 * 64 * 512,
        warp_size=64,
        elf_machine=0x4C,
    ),
)
BY_ARCHITECTURE = {row.architecture: row for row in GENERATIONS}
BY_ARCH = {row.arch: row for row in GENERATIONS}
BY_CAPABILITY = {row.capability: row for row in GENERATIONS if row.is_nvidia}
# Tile tables by name, each with the row of the generation that it was made for.
BY_TABLE = {row.table: row for row in GENERATIONS if row.table == row.architecture}
# Whether the kernels of a tile table read aligned operands through tensor descriptors.
DESCRIPTORS = {table: row.descriptors for table, row in BY_TABLE.items()}
_AMD = [row.arch for row in GENERATIONS if not row.is_nvidia]
_TEGRA = frozenset({*_OTHER_TEGRA, *(row.capability for row in GENERATIONS if row.tegra)})


class Target(NamedTuple):
    """A generation to compile for. ``ptx``: keep the PTX beside the machine code."""

    generation: Generation
    ptx: bool

    @property
    def architecture(self) -> str:
        return self.generation.architecture

    @property
    def arch(self) -> str:
        return self.generation.arch

    @property
    def table(self) -> str:
        return self.generation.table


def format_capability(capability: int) -> str:
    """A compute capability as NVIDIA writes it: ``"9.0"`` for 90."""
    return f"{capability // 10}.{capability % 10}"


def cuda_architecture(capability: int) -> str:
    """The tile table for a compute capability (``90`` for 9.0): that of the newest generation not newer than it.

    Raises:
        ValueError: the GPU is older than every generation that kernels are compiled for.
    """
    older = [row for row in BY_TABLE.values() if row.is_nvidia and row.capability <= capability]
    if not older:
        raise ValueError(
            f"compute capability {capability / 10:.1f}: the kernels need 8.0 (bfloat16 tensor cores) or newer"
        )
    return max(older, key=lambda row: row.capability).table


def parse_architectures(text: str, source: str = "architectures") -> list[Target]:
    """The targets that a list names, such as ``"8.0;9.0a 10.0+PTX,gfx942"``.

    "9.0" and "9.0a" are the same, because Triton compiles 9.0 and newer for that architecture alone. PTX is kept where
    the list asks for it, and for the newest target whose PTX newer GPUs can translate. Compute capabilities that no
    kernel is compiled for are skipped (:func:`skipped_words`).

    Args:
        text: architectures, separated by semicolons, commas or spaces.
        source: where the list comes from; the error message starts with it.

    Raises:
        ValueError: an unknown architecture, or none that kernels can be compiled for.
    """
    targets: dict[str, Target] = {}
    for word in _words(text):
        if _is_skipped(word):
            continue
        row, ptx = _find_row(word.removesuffix("+PTX")), word.endswith("+PTX")
        if row is None or (ptx and not row.is_nvidia):
            raise ValueError(f"{source}: got {word!r}, {_expected()}")
        if ptx or row.arch not in targets:
            targets[row.arch] = Target(row, ptx)
    if not targets:
        raise ValueError(f"{source}: got {text!r}, {_expected()}")
    portable = [target for target in targets.values() if target.generation.is_nvidia and not target.generation.specific]
    if portable:
        newest = max(portable, key=lambda target: target.generation.capability)
        targets[newest.arch] = newest._replace(ptx=True)
    return sorted(targets.values(), key=lambda target: GENERATIONS.index(target.generation))


def skipped_words(text: str) -> list[str]:
    """The words of a list that name GPUs which no kernel is compiled for."""
    return [word for word in _words(text) if _is_skipped(word)]


def _words(text: str) -> Sequence[str]:
    return re.split(r"[;,\s]+", text.strip(" \t\r\n;,"))


def _is_skipped(word: str) -> bool:
    match = re.fullmatch(r"(\d+)\.(\d)a?(\+PTX)?", word)
    return match is not None and int(match[1] + match[2]) in _TOO_OLD + _UNTRIED


def _find_row(name: str) -> Generation | None:
    """The generation that a word of a list names: ``9.0``, ``9.0a`` or ``gfx942``."""
    match = re.fullmatch(r"(\d+)\.(\d)(a?)", name)
    if match is None:
        return BY_ARCH[name] if name in _AMD else None
    row = BY_CAPABILITY.get(int(match[1] + match[2]))
    return None if row is not None and match[3] and not row.specific else row


def _expected() -> str:
    known = ", ".join(row.dotted + ("(a)" if row.specific else "") for row in BY_CAPABILITY.values())
    names = f"{known} (each with +PTX or without) and {', '.join(_AMD)}"
    return f"expected some of {names}, separated by semicolons, commas or spaces"
