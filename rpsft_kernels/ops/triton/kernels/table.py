"""The jitted kernels by name, and a variant's constants as the kernels take them; planning needs neither."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from ..variants import Variant
from .drift import drift_kernel, reduce_kernel, squares_kernel
from .full import full_drift_kernel, full_gradient_kernel
from .gradient import gradient_kernel
from .hopper_gradient import hopper_gradient_kernel
from .hopper_project import hopper_project_kernel
from .hopper_pull import hopper_pull_kernel
from .project import project_kernel
from .pull import pull_kernel
from .round import round_kernel

KERNELS = {
    "project": project_kernel,
    "drift": drift_kernel,
    "reduce": reduce_kernel,
    "squares": squares_kernel,
    "pull": pull_kernel,
    "gradient": gradient_kernel,
    "full_drift": full_drift_kernel,
    "full_gradient": full_gradient_kernel,
    "hopper_project": hopper_project_kernel,
    "round": round_kernel,
    "hopper_pull": hopper_pull_kernel,
    "hopper_gradient": hopper_gradient_kernel,
}
_TYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}


def kernel_constants(variant: Variant) -> dict[str, Any]:
    """The constants of a variant with Triton's dtypes in place of their names."""
    return {
        name: _TYPES[value] if name.endswith("_TYPE") and value is not None else value
        for name, value in variant.constants
    }
