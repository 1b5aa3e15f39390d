"""The program that sanitize.py runs under compute-sanitizer: every group of variants once, at small odd shapes.

The most used come first; after as many seconds as its argument says no more begin, and the last line says how many ran.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from rpsft_kernels import ops
from rpsft_kernels.ops.triton import toolchain
from rpsft_kernels.ops.triton.aot import dispatch as aot_dispatch
from support import Form, Layout, laid_out, make_problem, operands_of

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Shapes = tuple[tuple[int, int, int], ...]
# (m, n, k). Whole vectors and several tiles; then nothing that a tile or a vector divides; ranks of every class.
EVEN: Shapes = ((320, 576, 200), (576, 320, 200), (130, 200, 64), (77, 64, 24))
ODD: Shapes = ((131, 257, 17), (257, 131, 17), (40, 33, 5))
LARGE: Shapes = ((264, 520, 136), (520, 264, 136))


@dataclass(frozen=True)
class Case:
    """One launch of every phase. ``grad``: the dtype of the gradients, into which the result is added or written."""

    form: Form
    dtype: torch.dtype
    basis: torch.dtype = BF16
    base: torch.dtype | None = None
    layout: Layout = "contiguous"
    grad: torch.dtype | None = None
    accumulate: bool = True
    shapes: Shapes = EVEN

    def __str__(self) -> str:
        dtypes = " ".join(str(t)[6:] for t in (self.dtype, self.basis, self.base, self.grad) if t is not None)
        return f"{self.form} {dtypes} {self.layout} {'added' if self.accumulate else 'written'} {self.shapes[0]}"


def cases() -> Iterator[Case]:
    """The first are what everybody trains with."""
    for form, dtype, accumulate in itertools.product(("base", "block", "full"), (BF16, FP32, FP16), (True, False)):
        yield Case(form, dtype, accumulate=accumulate)  # type: ignore[arg-type]
    yield Case("base", BF16, shapes=LARGE)
    for form, layout in itertools.product(("base", "block", "full"), ("transposed", "padded", "sliced")):
        yield Case(form, BF16, layout=layout)  # type: ignore[arg-type]
    for form, dtype in itertools.product(("base", "block", "bare", "full"), (BF16, FP32, FP16)):
        yield Case(form, dtype, shapes=ODD)  # type: ignore[arg-type]
    for dtype, base in ((BF16, FP32), (FP32, BF16), (FP16, BF16)):
        for form in ("base", "full"):
            yield Case(form, dtype, base=base)  # type: ignore[arg-type]
    for grad, accumulate in itertools.product((FP32, FP16), (True, False)):
        yield Case("base", BF16, grad=grad, accumulate=accumulate)
        yield Case("full", BF16, grad=grad, accumulate=accumulate)
    for form, dtype in itertools.product(("base", "block", "bare"), (BF16, FP32, FP16)):
        yield Case(form, dtype, basis=FP32)  # type: ignore[arg-type]
    yield Case("base", BF16, basis=FP32, layout="transposed")
    yield Case("base", BF16, basis=FP32, shapes=LARGE)
    yield Case("base", FP32, basis=FP32, shapes=ODD, layout="sliced")


def run(case: Case, device: torch.device, backend: str = "triton") -> None:
    """Every launch of one case; results are looked at elsewhere."""
    problems = [
        make_problem(
            case.form,
            (m, n),
            k,
            case.dtype,
            basis_dtype=case.basis,
            base_dtype=case.base,
            layout=case.layout,
            device=device,
        )
        for m, n, k in case.shapes
    ]
    operands = operands_of(problems)
    drifts, squares = ops.project_drift(operands, backend)
    grads = [
        laid_out(torch.zeros(w.shape, dtype=case.grad or case.dtype, device=device), case.layout)
        for w in operands.weights
    ]
    ops.pull_back_(grads, operands.for_pull_back(), drifts, torch.ones_like(squares), case.accumulate, backend)
    # Reading what was written is part of what is watched.
    assert squares.isfinite().all() and all(bool(grad.isfinite().all()) for grad in grads), str(case)


def fill_scratch() -> None:
    """Let the launchers' scratch memory begin as zeros.

    Kernels put their descriptors there, by atomic exchanges that give back to nobody what was there before. initcheck
    takes each for a read of memory that was never written; all other reads are what it is here to watch.
    """

    def zeros(size: int, device: torch.device) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int8, device=device)

    vars(aot_dispatch)["_descriptor_scratch"] = zeros
    if not toolchain.triton_missing():
        from rpsft_kernels.ops.triton import jit

        vars(jit)["_scratch_allocator"] = lambda device: lambda size, alignment, stream: zeros(size, device)


def main(arguments: Sequence[str]) -> int:
    fill_scratch()
    seconds = float(arguments[0]) if arguments else float("inf")
    every = list(cases())
    began = time.monotonic()
    ran = 0
    for case in every:
        if time.monotonic() - began > seconds:
            break
        run(case, torch.device("cuda"))
        torch.cuda.synchronize()
        ran += 1
        print(f"{time.monotonic() - began:6.1f} s  {case}", flush=True)
    print(f"{ran} of {len(every)} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
