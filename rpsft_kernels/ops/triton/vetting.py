"""Scans code that Triton compiles here for compute capability 9.0, once, before its first launch: some versions make
code that computes wrong numbers (:mod:`rpsft_kernels.ops.triton.machine_code.register_hazards`).
"""

from __future__ import annotations

import hashlib
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from triton.runtime.cache import get_cache_manager

from . import toolchain
from .aot import dispatch as aot
from .machine_code.register_hazards import RULES, scan_cubin
from .variants import Variant

# "wgmma.mma_async....f32.bf16.bf16 {sums}, {a0, a1, a2, a3}, descriptor, ..." has its operand A in registers. An A in
# shared memory is a descriptor, like B.
_REGISTER_OPERAND = re.compile(r"wgmma\.mma_async[^{;]*\{[^}]*\}\s*,\s*\{")


def find_faults(kernel: Any) -> list[str]:
    """The faults of a kernel that Triton compiled (its CompiledKernel); [] for a good one.

    The result of a scan is kept in Triton's cache beside the machine code, for later processes.
    """
    ptx = kernel.asm.get("ptx")
    if ptx is not None and "wgmma.mma_async" not in ptx:
        return []
    image: bytes = kernel.asm["cubin"]
    name = f"rpsft-registers-{RULES}-{hashlib.sha256(image).hexdigest()[:32]}.json"
    cache = get_cache_manager(kernel.hash)
    faults = _read_record(cache.get_file(name))
    if faults is not None:
        return faults
    try:
        faults = scan_cubin(image)
    except ValueError as error:
        unsafe = toolchain.products_unsafe()
        computed = ptx is None or _REGISTER_OPERAND.search(ptx) is not None
        return [f"{unsafe}, and its machine code cannot be looked at ({error})"] if unsafe and computed else []
    # A cache that cannot be written may still hold kernels. Then the next process scans again.
    with suppress(OSError):
        cache.put(json.dumps(faults), name, binary=False)
    return faults


def _read_record(path: str | None) -> list[str] | None:
    """The result of an earlier scan; None if there is none that can be read."""
    try:
        faults = json.loads(Path(path).read_text(encoding="utf-8")) if path else None
    except (OSError, ValueError):
        return None
    return faults if isinstance(faults, list) and all(isinstance(each, str) for each in faults) else None


def explain_refusal(variant: Variant, device: torch.device, faults: list[str]) -> str | None:
    """The error message for a kernel with faults: kernel, GPU, compiler, the first fault, and the ways out.

    None for a kernel without faults.
    """
    if not faults:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    gpu = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
    compiler = f"Triton {toolchain.triton_version() or 'of an unknown version'} with ptxas {_assembler()}"
    more = f" (and {len(faults) - 1} more of the kind)" if len(faults) > 1 else ""
    ways = ["kernels compiled ahead of time by Triton 3.9 or newer (a wheel that carries them, or pip install . here)"]
    if aot.mode() == "0":
        ways.append("RPSFT_AOT=1, where they are installed (it is 0)")
    ways += ["Triton 3.9 or newer, or a torch that brings it", 'use_backend("torch")']
    return (
        f"{variant.label()} is not launched on {device} ({gpu}): as {compiler} compiles it, it may compute wrong "
        f"numbers: {faults[0]}{more}. Take one of: {'; '.join(ways)}"
    )


def _assembler() -> str:
    try:
        from triton.backends.nvidia.compiler import get_ptxas

        return str(get_ptxas(90).version)
    except Exception:  # this version is one word of a message about another error, which must not be hidden
        return "of an unknown version"
