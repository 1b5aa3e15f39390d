"""The two operations that carry the package, and the choice of the backend that runs them.

``project_drift`` maps weights to their drifts ``C = U^T (W - W0) V`` and ``pull_back`` is its adjoint,
``scale * U C V^T``. Both take the :class:`Operands` of many weights, which a backend can serve in
few launches.
"""

from .buckets import BucketLimits, WeightSpec, intermediate_parts, limits_of, plan_buckets
from .dispatch import (
    arithmetic_id,
    available_backends,
    check_gradient_dtype,
    requested_backend,
    resolve_backend,
    use_backend,
)
from .operands import Operands
from .products import has_float64
from .programs import prepare_factors, prepare_program
from .reference import accumulation_dtype
from .runs import FactorProgram, Program, Run, open_run
from .torch_ops import (
    differentiate_projection,
    empty_grads,
    make_ready,
    project_drift,
    pull_back,
    pull_back_,
    without_autocast,
)

__all__ = [
    "BucketLimits",
    "FactorProgram",
    "Operands",
    "Program",
    "Run",
    "WeightSpec",
    "accumulation_dtype",
    "arithmetic_id",
    "available_backends",
    "check_gradient_dtype",
    "differentiate_projection",
    "empty_grads",
    "has_float64",
    "intermediate_parts",
    "limits_of",
    "make_ready",
    "open_run",
    "plan_buckets",
    "prepare_factors",
    "prepare_program",
    "project_drift",
    "pull_back",
    "pull_back_",
    "requested_backend",
    "resolve_backend",
    "use_backend",
    "without_autocast",
]
