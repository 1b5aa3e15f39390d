"""Writes the machine code in this folder: some of the package's kernels for compute capability 9.0, as the installed
Triton compiles them. For each version, from the repository's root:

    pip install --no-deps --target FOLDER triton==3.6.0
    PYTHONPATH=FOLDER:. python python_tests/data/keep.py

The sources may move on: what is kept is what those versions made of them once, which is what it is tested with.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path

os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

import triton

from rpsft_kernels.ops.triton.compiler import compile_variant
from rpsft_kernels.ops.triton.variants import list_variants

LABELS = {
    # W - W0 in registers.
    "project": "project(weight_type=bf16, base_type=bf16, basis_type=bf16, aligned=True, descriptor=True",
    # The same, but it waits for each product at once.
    "project-strided": "project(weight_type=bf16, base_type=bf16, basis_type=bf16, weight_parts=1",
    # Three parts of float32 in registers.
    "gradient": (
        "gradient(grad_type=fp32, basis_type=fp32, rows_contiguous=True, aligned=True, descriptor=True, "
        "grad_aligned=True, accumulate=True"
    ),
    "drift": "drift(basis_type=fp32, aligned=True, descriptor=True",
    # Both operands in shared memory.
    "pull": "pull(basis_type=bf16, aligned=True, descriptor=True",
    # Warp-specialised; of 3.9.0 alone.
    "hopper_project": "hopper_project(weight_type=bf16, base_type=bf16, weight_parts=1",
    "hopper_pull": "hopper_pull(stages",
    "hopper_gradient": "hopper_gradient(grad_type=bf16, accumulate=True",
}


def main() -> None:
    for name, beginning in LABELS.items():
        (variant, *_) = (v for v in list_variants("sm_90", True, (768,)) if v.label().startswith(beginning))
        image = compile_variant(variant, "sm_90").asm["cubin"]
        path = Path(__file__).parent / f"triton-{triton.__version__}-{name}.cubin.gz"
        path.write_bytes(gzip.compress(image, 9, mtime=0))
        print(f"{path.name}: {path.stat().st_size} bytes, {variant.label()}")


if __name__ == "__main__":
    main()
