"""Compiles variants in parallel processes into Triton's cache, where the launches of this process find them."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...ops.triton.aot.jobs import default_jobs
from ...ops.triton.aot.limits import check_limits
from ...ops.triton.aot.targets import BY_TABLE
from ...ops.triton.variants import ARGUMENT_TYPES, ARGUMENTS, Variant

# By variant, why it is not to be launched, None for one that may be; variants for which there was no time are absent.
Compiled = dict[Variant, "str | None"]
# Takes the variants, the most urgent first, a tile table's name, the device, and the seconds that it may take.
Compile = Callable[[Sequence[Variant], str, torch.device, float], Compiled]


def compile_variants(
    variants: Sequence[Variant],
    architecture: str,
    device: torch.device,
    seconds: float,
    compile_one: Callable[[str, torch.device, Variant], str | None] | None = None,
) -> Compiled:
    """Compile variants as the JIT of this process would, in parallel processes, into Triton's cache on the disk.

    Args:
        variants: the most urgent first.
        architecture: the tile table, for whose GPU the limits are checked.
        device: the GPU.
        seconds: what is not compiled by then is given up.
        compile_one: compiles one, in one of the processes (default: :func:`compile_as_jit`).
    """
    deadline = time.monotonic() + seconds
    compiled: Compiled = {}
    if not variants:
        return compiled
    task = partial(_compile_numbered, compile_one or compile_as_jit, architecture, device)
    # The processes inherit this one's environment, which is part of the cache's key. A pool, unlike an executor, can
    # be left while a compiler is still at work.
    with multiprocessing.get_context("spawn").Pool(min(default_jobs(), len(variants))) as pool:
        results = pool.imap_unordered(task, enumerate(variants))
        while len(compiled) < len(variants):
            try:
                number, reason = results.next(max(0.0, deadline - time.monotonic()))
            except multiprocessing.TimeoutError:
                break
            compiled[variants[number]] = reason
    return compiled


def _compile_numbered(
    compile_one: Callable[[str, torch.device, Variant], str | None],
    architecture: str,
    device: torch.device,
    numbered: tuple[int, Variant],
) -> tuple[int, str | None]:
    number, variant = numbered
    try:
        return number, compile_one(architecture, device, variant)
    except Exception as error:  # whatever the compiler raises, the variant is no candidate
        return number, f"{type(error).__name__}: {str(error).strip()[:300]}"


def compile_as_jit(architecture: str, device: torch.device, variant: Variant) -> str | None:
    """Compile a variant under the key that its launch will look for; returns why it must not be launched.

    Kernels compiled ahead of time (``compiler.compile_variant``) have other keys in Triton's cache.

    Raises:
        ValueError: its code may compute wrong numbers.
    """
    # These bring Triton, which planning does without.
    from ...ops.triton.jit import bind_jit
    from ...ops.triton.kernels.table import KERNELS, kernel_constants

    # Only that they are aligned matters. Nothing is launched.
    types = {"*i64": torch.int64, "*i32": torch.int32, "*fp32": torch.float32}
    arguments = tuple(torch.zeros(8, dtype=types[ARGUMENT_TYPES[name]]) for name in ARGUMENTS[variant.kernel])
    options = variant.options()
    if torch.version.hip is None:
        options["maxnreg"] = variant.registers
    # For compute capability 9.0 this scans the code, and keeps the result in the cache too.
    bind_jit(variant, 1, device, arguments)
    with torch.cuda.device(device):
        kernel = KERNELS[variant.kernel].run(*arguments, grid=(1,), warmup=True, **kernel_constants(variant), **options)
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    return "; ".join(_list_faults(variant, kernel, architecture)) or None


def _list_faults(variant: Variant, kernel: Any, architecture: str) -> Iterator[str]:
    """The limits that a kernel of Triton's exceeds: those by which builds leave kernels out."""
    from ...ops.triton.machine_code.cubin import read_cubin

    generation, shared = BY_TABLE[architecture], kernel.metadata.shared
    if not generation.is_nvidia:
        if shared > generation.block_shared:
            yield f"{shared} bytes of shared memory, of {generation.block_shared} that a block has"
        return
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        code = read_cubin(Path(file.name))
    entry = {
        "kernel": variant.kernel,
        "arch": generation.arch,
        "registers": code.registers,
        "spilled": code.stack + code.local,
        "maximal_registers": variant.registers,
        "threads": kernel.metadata.num_warps * kernel.metadata.warp_size,
        "blocks_per_sm": variant.blocks_per_sm,
        "shared": shared,
    }
    yield from check_limits(entry)
