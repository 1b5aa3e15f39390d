"""Compile variants for a GPU that need not be there, and read what the compiler made of them."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .kernels.table import KERNELS, kernel_constants
from .machine_code.cubin import disassemble, read_cubin
from .tile_table import DESCRIPTORS, interpreted
from .variants import ARGUMENT_TYPES, ARGUMENTS, Variant, list_variants

# Name of a tile table -> the compiler's target.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Of 8.x, whose PTX serves newer GPUs: version 8.0, which every driver of CUDA 12 and newer reads. Left alone, Triton
# writes the newest that its assembler knows, which wants as new a driver.
_PORTABLE_PTX = 80


@dataclass(frozen=True)
class Resources:
    """What one compiled variant uses: registers per thread, bytes of shared memory, bytes of spills, and how often
    each machine instruction occurs in its text.
    """

    variant: str
    architecture: str
    registers: int
    shared: int
    spilled: int
    instructions: dict[str, int]

    def count(self, prefix: str) -> int:
        """Instructions whose name begins with ``prefix``."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefix))


def compile_variant(variant: Variant, architecture: str) -> Any:
    """Triton's compiled kernel (``.asm`` holds "ttgir", "ptx", "cubin" or "hsaco"), for one of ``TARGETS`` or any other
    compute capability by the same way of naming.
    """
    if interpreted():
        raise ValueError("TRITON_INTERPRET is set: the interpreter cannot compile; unset it")
    names = ARGUMENTS[variant.kernel]
    signature = {name: ARGUMENT_TYPES[name] for name in names}
    signature |= {name: "constexpr" for name, _ in variant.constants}
    # torch allocates every argument at a multiple of 16 bytes at least.
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
    source = ASTSource(KERNELS[variant.kernel], signature, constexprs=kernel_constants(variant), attrs=attributes)
    options = variant.options()
    target = _target(architecture)
    if target.backend == "cuda":
        options["maxnreg"] = variant.registers
        if target.arch < 90:
            options["ptx_version"] = _PORTABLE_PTX
    return triton.compile(source, target=target, options=options)


def _target(architecture: str) -> GPUTarget:
    return TARGETS.get(architecture) or GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def read_resources(variant: Variant, architecture: str) -> Resources:
    """Compile a variant and read registers, spills and instructions from its machine code."""
    compiled = compile_variant(variant, architecture)
    if architecture.startswith("gfx"):
        return _read_amd(variant.label(), architecture, compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return read_file(Path(file.name), variant.label(), architecture, compiled.metadata.shared)


def read_file(path: Path, label: str, architecture: str, shared: int) -> Resources:
    """What the machine code in a cubin uses. ``shared``: of its launch, which the code does not say."""
    # "/*0a10*/ @!P0 LDG.E.128 R4, ..." -> LDG.E.128
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", disassemble(path))
    instructions = Counter(names)
    spilled = sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL")))
    return Resources(label, architecture, read_cubin(path).registers, shared, spilled, dict(instructions))


def _read_amd(label: str, architecture: str, compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    instructions = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.M))
    return Resources(
        label, architecture, int(registers[1]) if registers else 0, compiled.metadata.shared,
        int(spills[1]) if spills else 0, dict(instructions),
    )  # fmt: skip


def survey(architecture: str, ranks: tuple[int, ...] = (768,), jobs: int = 1) -> Iterator[Resources]:
    """The resources of every variant of an architecture, in a fixed order."""
    variants = list(list_variants(architecture, DESCRIPTORS[architecture], ranks))
    if jobs == 1:
        yield from map(partial(read_resources, architecture=architecture), variants)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(partial(read_resources, architecture=architecture), variants, chunksize=4)
