"""Kernel variants: what is decided at compile time for one launch, as plain values that can be listed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

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
# The names by which variants hold dtypes: ``problem`` makes them of torch's, ``kernels`` turns them into Triton's own.
TypeName = Literal["bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class Variant:
    """One compiled kernel: its name in ``ARGUMENTS``, its constants (plain values), warps and pipeline stages, and how
    many of its programs share a multiprocessor.
    """

    kernel: str
    constants: tuple[tuple[str, Any], ...]
    warps: int
    stages: int
    residents: int = 1

    def options(self) -> dict[str, Any]:
        """The compiler's options. fp fusion is off so that every Triton version rounds the same way."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": False}

    @property
    def registers(self) -> int:
        """Registers that a thread of an NVIDIA GPU may have so that all residents fit (64 Ki a multiprocessor).

        Said explicitly because ptxas, left alone, aims at more residents than there are, and spills.
        """
        return min(255, (64 << 10) // (32 * self.warps * self.residents))

    @property
    def blocks(self) -> tuple[int, int, int]:
        """The tile shape; 0 for a dimension that the kernel has not."""
        constants = dict(self.constants)
        return (constants.get("BLOCK_M", 0), constants.get("BLOCK_N", 0), constants.get("BLOCK_K", 0))

    def label(self) -> str:
        """A short name for reports: the kernel and the constants that differ from 0, False and None."""
        shown = [f"{k.lower()}={v}" for k, v in self.constants if v is not None and v is not False]
        return f"{self.kernel}({', '.join(shown)}, warps={self.warps}, stages={self.stages})"


def _variant(kernel: str, config: TileConfig, **constants: Any) -> Variant:
    return Variant(kernel, tuple(constants.items()), config.warps, config.stages, config.per_multiprocessor)


def basis_parts(basis: TypeName) -> int:
    """bfloat16 parts that carry a basis of this dtype."""
    return 1 if basis == "bf16" else 3


def _basis_operands(basis: TypeName) -> str:
    return "one part" if basis == "bf16" else "parts"


@dataclass(frozen=True)
class Form:
    """What decides the arithmetic of a bucket: the dtypes of W, W0 (None: no base) and of the bases."""

    weight: TypeName
    base: TypeName | None
    basis: TypeName

    @property
    def basis_parts(self) -> int:
        return basis_parts(self.basis)

    @property
    def basis_operands(self) -> str:
        """The table's class for the product of a basis with T."""
        return "parts" if self.planes > 1 else _basis_operands(self.basis)

    @property
    def weight_parts(self) -> int:
        """bfloat16 parts of the first product's left operand: the drift's, or W's to its last bit."""
        if self.base is not None:
            return self.basis_parts
        return {"bf16": 1, "fp16": 2, "fp32": 3}[self.weight]

    @property
    def planes(self) -> int:
        """bfloat16 parts in which T is stored: one where it is as small as the drift, else float32's three."""
        return self.basis_parts if self.base is not None else 3

    @property
    def operands(self) -> str:
        """The table's class for the first product."""
        if max(self.basis_parts, self.weight_parts, self.planes) > 1:
            return "parts"
        return "wide" if "fp32" in (self.weight, self.base) else "one part"


@dataclass(frozen=True)
class Access:
    """How a launch may read: see ``tile.read_tile``. ``even`` belongs to the kernel it was computed for."""

    aligned: bool
    descriptor: bool
    even: bool


def _operands(operands: str, access: Access) -> str:
    return operands if access.aligned else "strided"


def project_variant(architecture: str, form: Form, rank: int, rows_contiguous: bool, access: Access) -> Variant:
    config = tile_config(architecture, "project", rank, _operands(form.operands, access))
    return _variant(
        "project",
        config,
        WEIGHT_TYPE=form.weight,
        BASE_TYPE=form.base,
        BASIS_TYPE=form.basis,
        ROWS_CONTIGUOUS=rows_contiguous,
        ALIGNED=access.aligned,
        DESCRIPTOR=access.descriptor,
        EVEN=access.even,
        WEIGHT_PARTS=form.weight_parts,
        BASIS_PARTS=form.basis_parts,
        PLANES=form.planes,
        # The fifth-generation tensor core takes the computed operand from shared memory.
        SWAPPED=architecture == "sm_100" and rows_contiguous,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


def drift_variant(
    architecture: str, form: Form, rank: int, transposed: bool, access: Access, drift_aligned: bool, has_block: bool
) -> Variant:
    config = tile_config(architecture, "drift", rank, _operands(form.basis_operands, access))
    return _variant(
        "drift",
        config,
        BASIS_TYPE=form.basis,
        TRANSPOSED=transposed,
        ALIGNED=access.aligned,
        DESCRIPTOR=access.descriptor,
        EVEN=access.even,
        DRIFT_ALIGNED=drift_aligned,
        HAS_BLOCK=has_block,
        BASIS_PARTS=form.basis_parts,
        PLANES=form.planes,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


def reduce_variant(drift: Variant) -> Variant:
    """The second pass that belongs to a drift variant."""
    kept = ("TRANSPOSED", "EVEN", "DRIFT_ALIGNED", "HAS_BLOCK", "BLOCK_M", "BLOCK_N")
    constants = {name: value for name, value in drift.constants if name in kept}
    constants["SLAB"] = min(32, constants["BLOCK_M"])
    return Variant("reduce", tuple(constants.items()), drift.warps, 1, drift.residents)


def squares_variant() -> Variant:
    return Variant("squares", (("BLOCK", 1024),), 4, 1)


def pull_variant(
    architecture: str, basis: TypeName, rank: int, transposed: bool, access: Access, drift_aligned: bool
) -> Variant:
    config = tile_config(architecture, "pull", rank, _operands(_basis_operands(basis), access))
    return _variant(
        "pull",
        config,
        BASIS_TYPE=basis,
        TRANSPOSED=transposed,
        ALIGNED=access.aligned,
        DESCRIPTOR=access.descriptor,
        EVEN=access.even,
        DRIFT_ALIGNED=drift_aligned,
        BASIS_PARTS=basis_parts(basis),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


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
    operands = "wide" if grad == "fp32" and basis == "bf16" else _basis_operands(basis)
    config = tile_config(architecture, "gradient", rank, _operands(operands, access))
    return _variant(
        "gradient",
        config,
        GRAD_TYPE=grad,
        BASIS_TYPE=basis,
        ROWS_CONTIGUOUS=rows_contiguous,
        ALIGNED=access.aligned,
        DESCRIPTOR=access.descriptor,
        EVEN=access.even,
        GRAD_ALIGNED=grad_aligned,
        ACCUMULATE=accumulate,
        BASIS_PARTS=basis_parts(basis),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
    )


def full_drift_variant(architecture: str, weight: TypeName, base: TypeName, aligned: bool) -> Variant:
    config = tile_config(architecture, "full", 0, "one part")
    return _variant(
        "full_drift",
        config,
        WEIGHT_TYPE=weight,
        BASE_TYPE=base,
        ALIGNED=aligned,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )


def full_gradient_variant(
    architecture: str, weight: TypeName, base: TypeName, grad: TypeName, aligned: bool, accumulate: bool
) -> Variant:
    config = tile_config(architecture, "full", 0, "one part")
    return _variant(
        "full_gradient",
        config,
        WEIGHT_TYPE=weight,
        BASE_TYPE=base,
        GRAD_TYPE=grad,
        ALIGNED=aligned,
        ACCUMULATE=accumulate,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
    )


# W, W0: what training loops hold. W0 is bfloat16 where that is exact, else of the dtype that was anchored: float32 of a
# model that was cast to bfloat16 since. W0 of other pairs, which casts can leave behind, is cast: ``problem.readable``.
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
_BASES: tuple[TypeName, ...] = ("bf16", "fp32")
_GRADS: tuple[TypeName, ...] = ("bf16", "fp16", "fp32")
_BOTH = (False, True)


def accesses(descriptors: bool) -> tuple[Access, ...]:
    """The ways to read that an architecture has: the strided one for any operand, and those for aligned ones."""
    strided = Access(aligned=False, descriptor=False, even=False)
    if descriptors:
        return (strided, Access(True, True, False))
    return (strided, Access(True, False, False), Access(True, False, True))


def list_variants(architecture: str, descriptors: bool, ranks: tuple[int, ...] = (768,)) -> Iterator[Variant]:
    """Every variant that the planners can ask for on an architecture, each once, and no other.

    Args:
        architecture: the name of a tile table.
        descriptors: whether it reads aligned operands through tensor descriptors.
        ranks: one rank of each class (``tile_table.rank_class``) that is wanted.
    """
    seen: set[Variant] = set()
    for variant in _all_variants(architecture, descriptors, tuple(dict.fromkeys(map(rank_class, ranks)))):
        if variant not in seen:
            seen.add(variant)
            yield variant


def _all_variants(architecture: str, descriptors: bool, ranks: tuple[int, ...]) -> Iterator[Variant]:
    yield squares_variant()
    for rank, basis, access in product(ranks, _BASES, accesses(descriptors)):
        yield from _forward_variants(architecture, rank, basis, access)
        yield from _backward_variants(architecture, rank, basis, access)
    for (weight, base), aligned in product(WEIGHT_AND_BASE, _BOTH):
        if base is not None:
            yield full_drift_variant(architecture, weight, base, aligned)
            for grad, accumulate in product(_GRADS, _BOTH):
                yield full_gradient_variant(architecture, weight, base, grad, aligned, accumulate)


def _forward_variants(architecture: str, rank: int, basis: TypeName, access: Access) -> Iterator[Variant]:
    for weight, base in WEIGHT_AND_BASE:
        form = Form(weight, base, basis)
        # Without a base T comes with a block B to subtract, or bare: B itself is made so, and so are the parts of C
        # that several tiles or ranks add up before B is subtracted, and C by ``project``.
        for flipped, has_block in product(_BOTH, _BOTH if base is None else (False,)):
            project = project_variant(architecture, form, rank, flipped, access)
            drift = drift_variant(architecture, form, rank, flipped, access, access.aligned, has_block)
            # How strided weights lie is no matter of the kernel: their strides are not known to it.
            if (access.aligned or not flipped) and _divides(access, rank, project.blocks[1], drift.blocks[1]):
                yield project
            if _divides(access, rank, *drift.blocks[:2]):
                yield drift
                yield reduce_variant(drift)


def _backward_variants(architecture: str, rank: int, basis: TypeName, access: Access) -> Iterator[Variant]:
    gradients = [
        gradient_variant(architecture, basis, grad, rank, flipped, way, way.aligned, accumulate)
        # P is padded to whole tiles of both phases, and gradients may be strided where the bases are aligned.
        for way in dict.fromkeys((access, Access(False, False, False)))
        for grad, accumulate, flipped in product(_GRADS, _BOTH, _BOTH)
    ]
    depth = min(gradient.blocks[2] for gradient in gradients)
    for flipped in _BOTH:
        pull = pull_variant(architecture, basis, rank, flipped, access, access.aligned)
        if _divides(access, rank, *pull.blocks[1:], depth):
            yield pull
    for gradient in gradients:
        if dict(gradient.constants)["ALIGNED"] == access.aligned and _divides(access, rank, gradient.blocks[2]):
            yield gradient


def _divides(access: Access, rank: int, *blocks: int) -> bool:
    """Whether tiles of these extents divide some rank of its class, for a way to read that wants it."""
    return not access.even or rank_class(max(blocks)) <= rank
