"""Kernels compiled in a process of their own: the tests' own process may have Triton's interpreter in their place."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

from rpsft_kernels.ops.triton.variants import Variant


class Compiled(NamedTuple):
    """The PTX and the machine code of a variant, and what its launch needs: threads per program / 32, bytes of shared
    memory per program, bytes of scratch memory per program and their alignment.
    """

    ptx: str
    cubin: bytes
    warps: int
    shared: int
    scratch: int
    scratch_align: int


def _compile_really() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(variant: Variant, architecture: str) -> Compiled:
    from rpsft_kernels.ops.triton.compiler import compile_variant

    kernel = compile_variant(variant, architecture)
    data = kernel.metadata
    scratch = data.global_scratch_size, data.global_scratch_align
    return Compiled(kernel.asm["ptx"], kernel.asm["cubin"], data.num_warps, data.shared, *scratch)


class Compiler:
    """Compiles variants, each once; Triton's cache on the disk serves those that another process has compiled."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _compile_really)
        self._compiled: dict[tuple[Variant, str], Compiled] = {}

    def compile(self, variant: Variant, architecture: str) -> Compiled:
        found = self._compiled.get((variant, architecture))
        if found is None:
            found = self._pool.submit(_compile, variant, architecture).result()
            self._compiled[variant, architecture] = found
        return found

    def close(self) -> None:
        self._pool.shutdown()
