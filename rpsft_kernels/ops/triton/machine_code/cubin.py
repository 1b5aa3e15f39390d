"""Reads the facts that a file of machine code holds about itself, with the tools that come with Triton."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..aot.targets import GENERATIONS

# AMD's architectures by the machine number in the flags of an ELF header.
_AMD_MACHINES = {row.elf_machine: row.arch for row in GENERATIONS if not row.is_nvidia}
_ELF_AMD = 224


@dataclass(frozen=True)
class MachineCode:
    """A cubin.

    Attributes:
        parameters: (offset, size) in bytes of each parameter, in order.
        stack, local: bytes of memory that a thread has for values that do not fit its registers.
        threads: threads of a block; 0 if the file does not tell.
    """

    arch: str
    entry: str
    parameters: tuple[tuple[int, int], ...]
    registers: int
    stack: int
    local: int
    threads: int


@lru_cache(maxsize=1)
def nvidia_tools() -> Path:
    """The folder of ptxas, cuobjdump and nvdisasm."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def read_cubin(path: Path) -> MachineCode:
    """Read a cubin with cuobjdump alone, independently of how the file and its manifest were made.

    Raises:
        ValueError: the file is no cubin, or does not hold exactly one kernel; the message says which.
    """
    # "ELF file    1: name.sm_90a.cubin"
    arch = re.search(r"ELF file\s+1:\s+.*\.(sm_\d+a?)\.cubin\s*$", _cuobjdump("-lelf", path))
    usage = _cuobjdump("-res-usage", path)
    entries = re.findall(r"^\s*Function (\S+):", usage, re.M)
    if arch is None or len(entries) != 1:
        content = f"functions {', '.join(entries) or 'none'} for {arch[1] if arch else 'no architecture'}"
        raise ValueError(f"path: {path.name} holds {content}, expected a cubin of one kernel")
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    text = _cuobjdump("-elf", path)
    records = re.findall(r"Ordinal\s*:\s*0x(\w+)\s+Offset\s*:\s*0x(\w+)\s+Size\s*:\s*0x(\w+)", text)
    by_ordinal = {int(ordinal, 16): (int(offset, 16), int(size, 16)) for ordinal, offset, size in records}
    threads = re.search(r"EIATTR_REQNTID\s+Format:\s*\w+\s+Value:\s*0x(\w+) 0x(\w+) 0x(\w+)", text)
    block = 1
    for size in threads.groups() if threads else ("0",):
        block *= int(size, 16)
    return MachineCode(
        arch=arch[1],
        entry=entries[0],
        parameters=tuple(by_ordinal[ordinal] for ordinal in sorted(by_ordinal)),
        registers=used["REG"],
        stack=used["STACK"],
        local=used["LOCAL"],
        threads=block,
    )


def _cuobjdump(option: str, path: Path) -> str:
    command = [str(nvidia_tools() / "cuobjdump"), option, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if run.returncode != 0:
        raise ValueError(f"path: cuobjdump cannot read {path.name}: {(run.stderr or run.stdout).strip()[-200:]}")
    return run.stdout


def disassembler() -> Path:
    """nvdisasm: the one that TRITON_NVDISASM_PATH names, else Triton's own, else the one on PATH.

    Raises:
        ValueError: there is no nvdisasm.
    """
    named = os.environ.get("TRITON_NVDISASM_PATH")
    if named:
        if not os.access(named, os.X_OK):
            raise ValueError(f"environment variable TRITON_NVDISASM_PATH: {named!r} is no program")
        return Path(named)
    program = None
    if importlib.util.find_spec("triton") is not None:
        program = shutil.which("nvdisasm", path=str(nvidia_tools()))
    program = program or shutil.which("nvdisasm")
    if program is None:
        raise ValueError(
            "nvdisasm, which reads machine code, is not found: the package triton brings it (pip install triton), as "
            "does CUDA; TRITON_NVDISASM_PATH names one"
        )
    return Path(program)


def disassemble(path: Path, indirect: bool = False) -> str:
    """A cubin's instructions, one a line.

    Args:
        path: the cubin.
        indirect: also print where indirect branches may go, which takes twice the time.

    Raises:
        ValueError: there is no nvdisasm, or it cannot read the file.
    """
    # nvdisasm's data-flow analysis is slow, and only indirect branches need it.
    options = ["-c"] if indirect else ["-ndf", "-c"]
    command = [str(disassembler()), *options, str(path)]
    try:
        run = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be run: {error.strerror}") from error
    # Output without an instruction means that none was read; it must not pass for code without faults.
    if run.returncode != 0 or "/*0000*/" not in run.stdout:
        reason = (run.stderr or run.stdout).strip()[-200:] or f"{command[0]} prints nothing"
        raise ValueError(f"path: nvdisasm cannot read {path.name}: {reason}")
    return run.stdout


def disassemble_image(image: bytes) -> str:
    """The instructions of a cubin's content, with the targets of indirect branches where it has some.

    Raises:
        ValueError: there is no nvdisasm, or it cannot read the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(image)
        text = disassemble(path)
        return disassemble(path, indirect=True) if re.search(r"\bBRXU? ", text) else text


def read_hsaco(image: bytes) -> tuple[str, set[str]]:
    """The architecture of an AMD code object, and the kernels that it describes.

    Raises:
        ValueError: the image is no such object, or its architecture is one that no build is for.
    """
    machine = flags = 0
    if image[:4] == b"\x7fELF" and len(image) > 64:
        (machine,), (flags,) = struct.unpack_from("<H", image, 18), struct.unpack_from("<I", image, 48)
    if machine != _ELF_AMD or flags & 0xFF not in _AMD_MACHINES:
        known = ", ".join(_AMD_MACHINES.values())
        raise ValueError(f"image: got an ELF machine {machine} with flags {flags:#x}, expected {_ELF_AMD} of {known}")
    # The descriptor of a kernel is a symbol with the kernel's name and this suffix.
    return _AMD_MACHINES[flags & 0xFF], {name.decode() for name in re.findall(rb"\0(\w+)\.kd\0", image)}
