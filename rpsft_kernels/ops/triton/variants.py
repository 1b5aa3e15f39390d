"""Kernel variants: the compile-time choices of one launch, as plain values that can be listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from .aot.targets import BY_TABLE, SM_REGISTERS, THREAD_REGISTERS, WARP_SIZE
from .tile_table import TileConfig, rank_class, tile_config

# The arguments that are not compile-time constants: int64 table, int32 schedule, float32 vectors.
ARGUMENTS = {
    "project": ("table", "starts", "runs", "order"),
    "drift": ("table", "starts", "runs", "order", "squares"),
    "reduce": ("table", "starts", "runs", "order", "squares"),
    "squares": ("table", "squares", "totals"),
    "pull": ("table", "starts", "runs", "order", "scales"),
    "gradient": ("table", "starts", "runs", "order"),
    "full_drift": ("table", "starts", "runs", "order", "squares"),
    "full_gradient": ("table", "starts", "runs", "order", "scales"),
    "hopper_project": ("table", "starts", "runs", "order"),
    "round": ("table", "starts", "runs", "order"),
    "hopper_pull": ("table", "starts", "runs", "order", "scales"),
    "hopper_gradient": ("table", "starts", "runs", "order"),
}
ARGUMENT_TYPES = {
    "table": "*i64",
    "starts": "*i32",
    "runs": "*i32",
    "order": "*i32",
    "squares": "*fp32",
    "totals": "*fp32",
    "scales": "*fp32",
}
# Kernels of two consumers, whose warps a variant counts, and a producer that takes up as many.
SPECIALISED = ("hopper_project", "hopper_pull", "hopper_gradient")
# Variants hold dtypes by these names: ``layout`` derives them from torch's, ``kernels`` turns them into Triton's own.
TypeName = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: its name in ``ARGUMENTS``, its constants (plain values), its warps and pipeline stages, and
    how many of its programs share a multiprocessor.
    """

    kernel: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    blocks_per_sm: int = 1

    def options(self) -> dict[str, Any]:
        """The compiler's options. Floating-point fusion is off so that every Triton version rounds the same way."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    @property
    def registers(self) -> int:
        """The registers that a thread of an NVIDIA GPU may have so that ``blocks_per_sm`` blocks fit.

        ptxas needs the explicit limit: without it, it aims at more blocks than there are, and spills. Warps that share
        their registers out among themselves must be launched with whole units of 8.
        """
        if self.kernel in SPECIALISED:
            return SM_REGISTERS // (WARP_SIZE * 3 * self.warps * self.blocks_per_sm) // 8 * 8
        return min(THREAD_REGISTERS, SM_REGISTERS // (WARP_SIZE * self.warps * self.blocks_per_sm))

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The tile shape; 0 for a dimension that the kernel does not have."""
        constants = dict(self.constants)
        return (constants.get("BLOCK_M", 0), constants.get("BLOCK_N", 0), constants.get("BLOCK_K", 0))

    def label(self) -> str:
        """A short name for reports: the kernel and the constants that differ from 0, False and None."""
        shown = [f"{k.lower()}={v}" for k, v in self.constants if v is not None and v is not False]
        return f"{self.kernel}({', '.join(shown)}, warps={self.warps}, stages={self.stages})"


def basis_parts(basis: TypeName) -> int:
    """bfloat16 parts that carry a basis of this dtype."""
    return 1 if basis == "bf16" else 3


def _basis_class(basis: TypeName) -> str:
    return "one part" if basis == "bf16" else "parts"


@dataclass(frozen=True)
class Precision:
    """The dtypes that decide the arithmetic of a bucket: of W, of W0 (None if there is no base), of U and V."""

    weight: TypeName
    base: TypeName | None
    basis: TypeName

    @property
    def basis_parts(self) -> int:
        return basis_parts(self.basis)

    @property
    def drift_class(self) -> str:
        """The tile table's class for the product of a basis with T."""
        return "parts" if self.planes > 1 else _basis_class(self.basis)

    @property
    def weight_parts(self) -> int:
        """bfloat16 parts of the first product's left operand: those of W - W0, or all that W needs to be exact."""
        if self.base is not None:
            return self.basis_parts
        return {"bf16": 1, "fp16": 2, "fp32": 3}[self.weight]

    @property
    def planes(self) -> int:
        """bfloat16 parts in which T is stored: one if T is as small as the drift, else the three of a float32."""
        return self.basis_parts if self.base is not None else 3

    @property
    def project_class(self) -> str:
        """The tile table's class for the first product."""
        if self.base is None and self.basis_parts == 1 and self.weight != "fp32":
            return "bare"
        if max(self.basis_parts, self.weight_parts, self.planes) > 1:
            return "parts"
        return "wide" if "fp32" in (self.weight, self.base) else "one part"


@dataclass(frozen=True)
class Access:
    """The ways in which a launch may read its operands: see ``tile.read_tile``.

    ``even`` holds only for the kernel that it was computed for.
    """

    aligned: bool
    descriptor: bool
    even: bool


def _operand_class(aligned_class: str, access: Access) -> str:
    """The tile table's class: ``aligned_class``, unless something is not aligned."""
    return aligned_class if access.aligned else "strided"


def _access(access: Access) -> dict[str, Any]:
    return {"ALIGNED": access.aligned, "DESCRIPTOR": access.descriptor, "EVEN": access.even}


def _variant(kernel: str, config: TileConfig, axes: str = "MNK", **constants: Any) -> Variant:
    """A variant with a table's tile shape; ``axes``: the dimensions that its tiles have."""
    # The order of the constants is part of the kernel's name.
    blocks = {"M": config.block_m, "N": config.block_n, "K": config.block_k}
    constants |= {f"BLOCK_{axis}": blocks[axis] for axis in axes}
    return Variant(
        kernel,
        tuple(constants.items()),
        warps=config.warps,
        stages=config.stages,
        blocks_per_sm=config.blocks_per_sm,
    )


def project_variant(
    architecture: str, precision: Precision, rank: int, rows_contiguous: bool, access: Access, narrow: bool = False
) -> Variant:
    config = tile_config(architecture, "project", rank, _operand_class(precision.project_class, access), narrow)
    if config.specialised:
        return _variant(
            "hopper_project",
            config,
            WEIGHT_TYPE=precision.weight,
            BASE_TYPE=precision.base,
            ROWS_CONTIGUOUS=rows_contiguous,
            WEIGHT_PARTS=precision.weight_parts,
            PLANES=precision.planes,
            STAGES=config.stages,
        )
    generation = BY_TABLE.get(architecture)
    return _variant(
        "project",
        config,
        WEIGHT_TYPE=precision.weight,
        BASE_TYPE=precision.base,
        BASIS_TYPE=precision.basis,
        ROWS_CONTIGUOUS=rows_contiguous,
        **_access(access),
        WEIGHT_PARTS=precision.weight_parts,
        BASIS_PARTS=precision.basis_parts,
        PLANES=precision.planes,
        SWAPPED=generation is not None and generation.computed_operand_in_shared and rows_contiguous,
    )


def drift_variant(
    architecture: str,
    precision: Precision,
    rank: int,
    transposed: bool,
    access: Access,
    drift_aligned: bool,
    has_block: bool,
) -> Variant:
    return _variant(
        "drift",
        tile_config(architecture, "drift", rank, _operand_class(precision.drift_class, access)),
        BASIS_TYPE=precision.basis,
        TRANSPOSED=transposed,
        **_access(access),
        DRIFT_ALIGNED=drift_aligned,
        HAS_BLOCK=has_block,
        BASIS_PARTS=precision.basis_parts,
        PLANES=precision.planes,
    )


def reduce_variant(drift: Variant) -> Variant:
    """The second pass that belongs to a drift variant."""
    shared = ("TRANSPOSED", "EVEN", "DRIFT_ALIGNED", "HAS_BLOCK", "BLOCK_M", "BLOCK_N")
    constants = {name: value for name, value in drift.constants if name in shared}
    constants["SLAB"] = min(32, constants["BLOCK_M"])
    return Variant("reduce", tuple(constants.items()), warps=drift.warps, stages=1, blocks_per_sm=drift.blocks_per_sm)


def squares_variant() -> Variant:
    return Variant("squares", (("BLOCK", 1024),), warps=4, stages=1)


def pull_variant(
    architecture: str, basis: TypeName, rank: int, transposed: bool, access: Access, drift_aligned: bool
) -> Variant:
    config = tile_config(architecture, "pull", rank, _operand_class(_basis_class(basis), access))
    if config.specialised:
        return _variant("hopper_pull", config, TRANSPOSED=transposed, STAGES=config.stages)
    return _variant(
        "pull",
        config,
        BASIS_TYPE=basis,
        TRANSPOSED=transposed,
        **_access(access),
        DRIFT_ALIGNED=drift_aligned,
        BASIS_PARTS=basis_parts(basis),
    )


def round_variant(pull: Variant) -> Variant | None:
    """The pass over C that comes before a pull variant, if one does."""
    if pull.kernel != "hopper_pull":
        return None
    return Variant("round", (("BLOCK", 4096),), warps=4, stages=1, blocks_per_sm=4)


def gradient_variant(
    architecture: str,
    basis: TypeName,
    grad: TypeName,
    rank: int,
    rows_contiguous: bool,
    access: Access,
    grad_aligned: bool,
    accumulate: bool,
) -> Variant:
    aligned_class = "wide" if grad == "fp32" and basis == "bf16" else _basis_class(basis)
    config = tile_config(architecture, "gradient", rank, _operand_class(aligned_class, access))
    if config.specialised:
        return _variant(
            "hopper_gradient",
            config,
            GRAD_TYPE=grad,
            ROWS_CONTIGUOUS=rows_contiguous,
            ACCUMULATE=accumulate,
            STAGES=config.stages,
        )
    return _variant(
        "gradient",
        config,
        GRAD_TYPE=grad,
        BASIS_TYPE=basis,
        ROWS_CONTIGUOUS=rows_contiguous,
        **_access(access),
        GRAD_ALIGNED=grad_aligned,
        ACCUMULATE=accumulate,
        BASIS_PARTS=basis_parts(basis),
    )


def full_drift_variant(architecture: str, weight: TypeName, base: TypeName, aligned: bool) -> Variant:
    return _full_variant("full_drift", architecture, WEIGHT_TYPE=weight, BASE_TYPE=base, ALIGNED=aligned)


def full_gradient_variant(
    architecture: str, weight: TypeName, base: TypeName, grad: TypeName, aligned: bool, accumulate: bool
) -> Variant:
    return _full_variant(
        "full_gradient",
        architecture,
        WEIGHT_TYPE=weight,
        BASE_TYPE=base,
        GRAD_TYPE=grad,
        ALIGNED=aligned,
        ACCUMULATE=accumulate,
    )


def _full_variant(kernel: str, architecture: str, **constants: Any) -> Variant:
    # Full anchors have no rank: one row serves them all.
    return _variant(kernel, tile_config(architecture, "full", 0, "one part"), axes="MN", **constants)


# The dtypes of (W, W0) that training loops hold. W0 is bfloat16 if that is exact, else it has the dtype that was
# anchored, such as float32 for a model that was cast to bfloat16 since. Casts can leave other pairs behind; their W0 is
# cast by ``layout``.
WEIGHT_AND_BASE: tuple[tuple[TypeName, TypeName | None], ...] = (
    ("bf16", None),
    ("bf16", "bf16"),
    ("bf16", "fp32"),
    ("fp16", None),
    ("fp16", "bf16"),
    ("fp16", "fp16"),
    ("fp32", None),
    ("fp32", "bf16"),
    ("fp32", "fp32"),
)
_BASIS_TYPES: tuple[TypeName, ...] = ("bf16", "fp32")
_GRAD_TYPES: tuple[TypeName, ...] = ("bf16", "fp16", "fp32")
_BOTH = (False, True)


def list_accesses(descriptors: bool) -> tuple[Access, ...]:
    """The ways in which a launch can read: one for operands of any strides, and those for aligned operands."""
    strided = Access(aligned=False, descriptor=False, even=False)
    if descriptors:
        return (strided, Access(aligned=True, descriptor=True, even=False))
    aligned = Access(aligned=True, descriptor=False, even=False)
    return (strided, aligned, Access(aligned=True, descriptor=False, even=True))


def list_variants(architecture: str, descriptors: bool, ranks: tuple[int, ...] = (768,)) -> Iterator[Variant]:
    """Every variant that the planners can ask for on an architecture, each once, and no other.

    Args:
        architecture: the name of a tile table.
        descriptors: whether it reads aligned operands through tensor descriptors.
        ranks: one rank of each wanted class (``tile_table.rank_class``).
    """
    seen: set[Variant] = set()
    for variant in _all_variants(architecture, descriptors, tuple(dict.fromkeys(map(rank_class, ranks)))):
        if variant not in seen:
            seen.add(variant)
            yield variant


def _all_variants(architecture: str, descriptors: bool, ranks: tuple[int, ...]) -> Iterator[Variant]:
    yield squares_variant()
    for rank, basis, access in product(ranks, _BASIS_TYPES, list_accesses(descriptors)):
        yield from _forward_variants(architecture, rank, basis, access)
        yield from _backward_variants(architecture, rank, basis, access)
    for (weight, base), aligned in product(WEIGHT_AND_BASE, _BOTH):
        if base is not None:
            yield full_drift_variant(architecture, weight, base, aligned)
            for grad, accumulate in product(_GRAD_TYPES, _BOTH):
                yield full_gradient_variant(architecture, weight, base, grad, aligned, accumulate)


def _forward_variants(architecture: str, rank: int, basis: TypeName, access: Access) -> Iterator[Variant]:
    for weight, base in WEIGHT_AND_BASE:
        precision = Precision(weight, base, basis)
        # Without a base, T comes with a block B to subtract or without one. It comes without one where B itself is
        # made, where several tiles or ranks add up parts of C before B is subtracted, and for ``project``.
        for flipped, has_block in product(_BOTH, _BOTH if base is None else (False,)):
            drift = drift_variant(
                architecture, precision, rank, flipped, access, drift_aligned=access.aligned, has_block=has_block
            )
            # A kernel for strided weights does not know their strides, so it has one orientation only.
            for narrow in _BOTH if access.aligned or not flipped else ():
                project = project_variant(architecture, precision, rank, flipped, access, narrow)
                if _divides(access, rank, project.blocks[1], drift.blocks[1]):
                    yield project
            if _divides(access, rank, *drift.blocks[:2]):
                yield drift
                yield reduce_variant(drift)


def _backward_variants(architecture: str, rank: int, basis: TypeName, access: Access) -> Iterator[Variant]:
    gradients = [
        gradient_variant(
            architecture, basis, grad, rank, flipped, each, grad_aligned=each.aligned, accumulate=accumulate
        )
        # P is padded to whole tiles of both phases, and gradients may be strided where U and V are aligned.
        for each in dict.fromkeys((access, Access(aligned=False, descriptor=False, even=False)))
        for grad, accumulate, flipped in product(_GRAD_TYPES, _BOTH, _BOTH)
    ]
    depth = min(gradient.blocks[2] for gradient in gradients)
    for flipped in _BOTH:
        pull = pull_variant(architecture, basis, rank, flipped, access, drift_aligned=access.aligned)
        if _divides(access, rank, *pull.blocks[1:], depth):
            yield pull
            if (rounding := round_variant(pull)) is not None:
                yield rounding
    for gradient in gradients:
        aligned = gradient.kernel in SPECIALISED or dict(gradient.constants)["ALIGNED"]
        if aligned == access.aligned and _divides(access, rank, gradient.blocks[2]):
            yield gradient


def _divides(access: Access, rank: int, *blocks: int) -> bool:
    """Whether this access allows tiles of these extents: ``even`` needs them to divide some rank of the class."""
    return not access.even or rank_class(max(blocks)) <= rank
