"""Kernels compiled in a process of their own: the tests' own process may have Triton's interpreter in their place."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from rpsft_kernels.ops.triton.variant import Variant


class Compiled(NamedTuple):
    """The PTX of a variant and what its launch needs: threads per program / 32, bytes of shared memory per program,
    bytes of scratch memory per program and their alignment.
    """

    ptx: str
    warps: int
    shared: int
    scratch: int
    scratch_align: int


def _compile_really() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(variant: Variant, architecture: str) -> Compiled:
    from rpsft_kernels.ops.triton.compile import compile_variant

    kernel = compile_variant(variant, architecture)
    data = kernel.metadata
    return Compiled(kernel.asm["ptx"], data.num_warps, data.shared, data.global_scratch_size, data.global_scratch_align)


class Compiler:
    """Compiles variants, each once; Triton's cache on the disk serves those that another process has compiled."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), _compile_really)
        self._compiled: dict[tuple[Variant, str], Compiled] = {}

    def compile(self, variants: Iterable[Variant], architecture: str) -> Iterator[Compiled]:
        """In the order of ``variants``."""
        variants = list(variants)
        new = [v for v in dict.fromkeys(variants) if (v, architecture) not in self._compiled]
        for variant, compiled in zip(
            new, self._pool.map(partial(_compile, architecture=architecture), new), strict=True
        ):
            self._compiled[variant, architecture] = compiled
        return (self._compiled[variant, architecture] for variant in variants)

    def close(self) -> None:
        self._pool.shutdown()
