"""Compiles variants for a GPU that need not be there, and reads the resources that the compiler gave them."""

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
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

from .aot.targets import BY_ARCHITECTURE, DESCRIPTORS
from .kernels.table import KERNELS, kernel_constants
from .machine_code.cubin import disassemble, read_cubin
from .tile_table import is_interpreted
from .variants import ARGUMENT_TYPES, ARGUMENTS, Variant, list_variants


@dataclass(frozen=True)
class Resources:
    """The resources of one compiled variant: registers per thread, bytes of shared memory, bytes of spills, and how
    often each machine instruction occurs in its text.
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
    """Triton's compiled kernel (``.asm`` holds "ttgir", "ptx", "cubin" or "hsaco").

    Args:
        variant: what to compile.
        architecture: the architecture of a row of ``aot.targets.GENERATIONS``, such as ``"sm_90"``.
    """
    if is_interpreted():
        raise ValueError("TRITON_INTERPRET is set: the interpreter cannot compile; unset it")
    names = ARGUMENTS[variant.kernel]
    signature = {name: ARGUMENT_TYPES[name] for name in names}
    signature |= {name: "constexpr" for name, _ in variant.constants}
    # torch allocates every argument at a multiple of 16 bytes at least.
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(names))}
    kernel = KERNELS[variant.kernel]
    kind = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = kind(kernel, signature, constexprs=kernel_constants(variant), attrs=attributes)
    options = variant.options()
    generation = BY_ARCHITECTURE[architecture]
    if generation.is_nvidia:
        options["maxnreg"] = variant.registers
    if generation.ptx_version is not None:
        options["ptx_version"] = generation.ptx_version
    return triton.compile(source, target=GPUTarget(*generation.triton_target), options=options)


def read_resources(variant: Variant, architecture: str) -> Resources:
    """Compile a variant and read registers, spills and instructions from its machine code."""
    compiled = compile_variant(variant, architecture)
    if not BY_ARCHITECTURE[architecture].is_nvidia:
        return _read_amd(variant.label(), architecture, compiled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return read_file(Path(file.name), variant.label(), architecture, compiled.metadata.shared)


def read_file(path: Path, label: str, architecture: str, shared: int) -> Resources:
    """The resources of the machine code in a cubin. ``shared``: bytes of the launch, which the code does not tell."""
    # "/*0a10*/ @!P0 LDG.E.128 R4, ..." -> LDG.E.128
    names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)", disassemble(path))
    instructions = Counter(names)
    spilled = sum(n for name, n in instructions.items() if name.startswith(("LDL", "STL")))
    return Resources(
        variant=label,
        architecture=architecture,
        registers=read_cubin(path).registers,
        shared=shared,
        spilled=spilled,
        instructions=dict(instructions),
    )


def _read_amd(label: str, architecture: str, compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]
    registers = re.search(r"\.vgpr_count:\s+(\d+)", text)
    spills = re.search(r"\.vgpr_spill_count:\s+(\d+)", text)
    instructions = Counter(re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.M))
    return Resources(
        variant=label,
        architecture=architecture,
        registers=int(registers[1]) if registers else 0,
        shared=compiled.metadata.shared,
        spilled=int(spills[1]) if spills else 0,
        instructions=dict(instructions),
    )


def survey(architecture: str, ranks: tuple[int, ...] = (768,), jobs: int = 1) -> Iterator[Resources]:
    """The resources of every variant of a tile table, in a fixed order."""
    variants = list(list_variants(architecture, DESCRIPTORS[architecture], ranks))
    if jobs == 1:
        yield from map(partial(read_resources, architecture=architecture), variants)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(partial(read_resources, architecture=architecture), variants, chunksize=4)
