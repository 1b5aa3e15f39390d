"""Compiles one kernel ahead of time, and reads the facts that a launch needs from its machine code.

This runs in the build's own processes, which have Triton; torch need not be installed.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..machine_code.cubin import nvidia_tools
from ..machine_code.register_hazards import scan_cubin
from ..variants import ARGUMENT_TYPES, ARGUMENTS, Variant
from .library import description, kernel_id
from .limits import check_limits
from .targets import BY_ARCH, Target

# torch allocates every argument at a multiple of at least 16 bytes; compile_variant relies on it too.
_DIVISIBILITY = 16
_POINTER = 8


class Kernel(NamedTuple):
    """A manifest's entry without its files' names, and the files' content: machine code, and PTX if it is kept."""

    entry: dict[str, Any]
    images: list[bytes]


class LeftOut(NamedTuple):
    """A kernel whose code must not be launched, or would run badly, and the reason."""

    id: str
    label: str
    arch: str
    reason: str

    def __str__(self) -> str:
        return f"left out: {self.label} for {self.arch}: {self.reason}"


def compile_kernel(task: tuple[Variant, Target]) -> Kernel | LeftOut:
    """Compile a variant for a target; LeftOut if its code must not be kept.

    Raises:
        RuntimeError: Triton made a kernel that the launcher cannot start.
    """
    from ..compiler import compile_variant

    variant, target = task
    identity, label = kernel_id(variant, target.arch), variant.label()
    compiled = compile_variant(variant, target.architecture)
    metadata = compiled.metadata
    # Triton 3.6 has no fields for scratch memory on AMD, where it uses none.
    scratch, alignment, profile_scratch = (
        getattr(metadata, name, default)
        for name, default in (("global_scratch_size", 0), ("global_scratch_align", 1), ("profile_scratch_size", 0))
    )
    code = "cubin" if target.generation.is_nvidia else "hsaco"
    image = compiled.asm[code]
    unknown = [metadata.launch_cooperative_grid, getattr(metadata, "launch_pdl", False), metadata.tensordesc_meta]
    if metadata.num_ctas != 1 or profile_scratch or any(unknown):
        raise RuntimeError(f"{label} for {target.arch}: wants a launch that the launcher does not know")
    names = ARGUMENTS[variant.kernel]
    layout = _amd_layout(compiled.asm["amdgcn"]) if code == "hsaco" else parameter_table(image, metadata.name)
    # A launch packs one pointer each for the arguments, the scratch memory and the profiler's memory.
    if layout != [(_POINTER * i, _POINTER) for i in range(len(names) + 2)]:
        raise RuntimeError(f"{label} for {target.arch}: parameters at {layout}, not one pointer each")
    registers, spilled = _amd_usage(compiled.asm["amdgcn"]) if code == "hsaco" else _cubin_usage(image)
    entry = {
        "id": identity,
        **description(variant),
        "table": target.table,
        "arch": target.arch,
        "entry": metadata.name,
        "format": code,
        "threads": metadata.num_warps * metadata.warp_size,
        "shared": metadata.shared,
        "scratch": {"size": scratch, "alignment": alignment},
        "profile_scratch": profile_scratch,
        "arguments": [{"name": n, "type": ARGUMENT_TYPES[n], "divisibility": _DIVISIBILITY} for n in names],
        "layout": layout,
        "registers": registers,
        "spilled": spilled,
    }
    if reason := "; ".join(_faults(entry, image)):
        return LeftOut(identity, label, target.arch, reason)
    images = [image]
    if target.ptx:
        text = compiled.asm["ptx"]
        version = re.search(r"^\.version (\d+\.\d+)$", text, re.M)
        if version is None:
            raise RuntimeError(f"{label} for {target.arch}: its PTX has no version")
        entry["ptx"] = {"isa": version[1]}
        images.append(text.encode())
    return Kernel(entry, images)


def _faults(entry: dict[str, Any], image: bytes) -> Iterator[str]:
    """The reasons not to launch a kernel."""
    yield from check_limits(entry)
    # Compilers have overwritten registers of products that go on after their instruction.
    if BY_ARCH[entry["arch"]].asynchronous_products and (hazards := scan_cubin(image)):
        more = f" (and {len(hazards) - 1} more of the kind)" if len(hazards) > 1 else ""
        yield f"its machine code may compute wrong numbers: {hazards[0]}{more}"


def parameter_table(cubin: bytes, kernel: str) -> list[tuple[int, int]]:
    """(offset, size) in bytes of each parameter of a kernel, from the cubin's own table.

    The table is in the section ``.nv.info.<kernel>``. Each of its records has a format, an attribute and 16 bits of
    size or value; a record with the attribute 0x17 (EIATTR_KPARAM_INFO) describes one parameter.
    """
    (sections,) = struct.unpack_from("<Q", cubin, 0x28)
    entry_size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)

    def section(index: int) -> tuple[int, bytes]:
        name, _, _, _, offset, size = struct.unpack_from("<IIQQQQ", cubin, sections + index * entry_size)
        return name, cubin[offset : offset + size]

    _, strings = section(names)
    wanted = f".nv.info.{kernel}".encode()
    for index in range(1, count):
        name, data = section(index)
        if strings[name : strings.index(b"\0", name)] == wanted:
            break
    else:
        raise ValueError(f"cubin: has no section {wanted.decode()}")
    parameters: dict[int, tuple[int, int]] = {}
    at = 0
    while at < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, at)
        if form == 4 and attribute == 0x17:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", data, at + 4)
            parameters[ordinal] = (offset, flags >> 18)
        # A record of format 4 is followed by that many bytes; the others hold their value themselves.
        at += 4 + (size if form == 4 else 0)
    return [parameters[ordinal] for ordinal in sorted(parameters)]


def _amd_layout(assembly: str) -> list[tuple[int, int]]:
    arguments = re.search(r"\.args:\n(.*?)\n    \.group_segment", assembly, re.S)
    pairs = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)", arguments[1] if arguments else "")
    return [(int(offset), int(size)) for offset, size in pairs]


def _amd_usage(assembly: str) -> tuple[int, int]:
    matches = (re.search(rf"\.{name}:\s+(\d+)", assembly) for name in ("vgpr_count", "private_segment_fixed_size"))
    registers, spilled = (int(match[1]) if match else 0 for match in matches)
    return registers, spilled


def _cubin_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes that it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(nvidia_tools() / "cuobjdump"), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
