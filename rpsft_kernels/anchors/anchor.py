"""One weight's anchor: the pieces of the pretrained weight W0 that RPSFT (arXiv 2605.10973) keeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import DTYPES, check_basis_dtype, check_finite, check_rank, check_weight, dtype_name
from ..distributed.shard import Shard
from ..low_rank.start import AdapterStart
from .make import AnchorOptions, Subspace, anchor_fields, check_seed, plan_rank, solve
from .tensors import compute_block, pad_rows

Form = Literal["base", "block", "full"]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Anchor:
    """The constants that the penalty compares a weight (m, n) with. Immutable; two anchors are equal only if identical.

    There are three forms. ``"base"`` keeps U, V and W0: C = U^T (W - W0) V. ``"block"`` keeps U, V and
    B = U^T W0 V: C = U^T W V - B. ``"full"`` keeps W0 alone, for ranks of at least min(m, n), where the
    penalty is ||W - W0||_F^2.

    Attributes:
        left: U, shape (m, k), bfloat16, float32 or (for float64 weights) float64; None in the full form.
        right: V, shape (n, k), the dtype of ``left``; None in the full form.
        base: W0, shape (m, n), bfloat16 or the weight's dtype; None in the block form.
        block: B, shape (k, k), float32 (float64 for float64 weights); only in the block form.
        shape: (m, n).
        weight_dtype: Dtype of the weight that was anchored.
        rank: k; min(m, n) in the full form.
        energy: Share of ||W0||_F^2 between the k directions, ``||U^T W0 V||_F^2 / ||W0||_F^2``, in [0, 1].
        arithmetic: :func:`rpsft_kernels.ops.arithmetic_id` of what computed ``block``; None where unknown
            or where there is no block.
        part: The shard of the weight that the pieces belong to; None for the whole weight. ``left`` has the shard's
            rows, ``right`` its columns, ``base`` its elements (1-D for a flat range) and ``block`` is the shard's own
            summand of U^T W0 V. ``shape`` and ``rank`` remain those of the whole weight.
        share: The share of energy that ``rank`` was chosen for; None where it was given.
        starts: What adapters (PEFT) were when the weight was anchored, by their names, where that is not nothing: W0
            has them in it, and the penalty of a weight with adapters counts from there.
        random_seed: The seed of U and V where they are random, a control for experiments; None where they are the
            singular vectors of W0, and in the full form.

    A basis is held as the first k columns of a zero-padded buffer whose rows are a multiple of 16 elements
    long, the other pieces contiguous; what comes otherwise is copied. Orthonormality is not checked.

    Raises:
        ValueError: the pieces do not make up one of the forms, or disagree in shape, dtype or device, hold
            NaN or infinity, or require grad.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    base: Tensor | None = None
    block: Tensor | None = None
    shape: tuple[int, int]
    weight_dtype: torch.dtype
    rank: int
    energy: float
    arithmetic: str | None = None
    part: Shard | None = None
    share: float | None = None
    random_seed: int | None = None
    starts: Mapping[str, AdapterStart] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_scalars()
        self._check_form()
        self._check_pieces()
        # Tensors made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            for name, piece in self.pieces().items():
                laid_out = pad_rows(piece) if name in ("left", "right") else piece.contiguous()
                object.__setattr__(self, name, laid_out)

    @classmethod
    def from_weight(
        cls,
        weight: Tensor,
        rank: int | float,
        *,
        keep_base: bool = True,
        basis_dtype: torch.dtype = torch.bfloat16,
    ) -> Anchor:
        """Make the anchor of a pretrained weight, on the weight's device. It shares no memory with the weight.

        Args:
            weight: W0, shape (m, n), a tensor or parameter in bfloat16, float16, float32 or float64, any
                strides, finite.
            rank: k, at least 1. From min(m, n) on the form is full, whatever ``keep_base``. A float strictly between 0
                and 1 is a share of energy: k is the smallest number of directions that hold this share of ||W0||_F^2.
            keep_base: True keeps W0 (in bfloat16 where that is exact, else in its own dtype); False keeps
                the k x k block, computed by the backend in force.
            basis_dtype: bfloat16 or float32; float64 for float64 weights.

        Raises:
            ValueError: an argument is not as described.
        """
        options = AnchorOptions(rank, keep_base, basis_dtype)
        solution, basis = solve(weight, options)
        whole = Shard.whole((weight.shape[0], weight.shape[1]))
        return cls(**anchor_fields(weight, whole, solution, basis, options))

    @property
    def form(self) -> Form:
        if self.left is None:
            return "full"
        return "base" if self.block is None else "block"

    @property
    def subspace(self) -> Subspace:
        """``"random"`` where U and V are a control for experiments."""
        return "singular" if self.random_seed is None else "random"

    @property
    def planned_rank(self) -> int:
        """k that the work on a replicated weight is divided by: see :func:`rpsft_kernels.anchors.make.plan_rank`."""
        return self.rank if self.share is None else plan_rank(self.shape, self.share)

    @property
    def device(self) -> torch.device:
        return next(iter(self.pieces().values())).device

    @property
    def nbytes(self) -> int:
        """Bytes of all pieces, the padding of U and V included."""
        subspaces = sum(p.shape[0] * p.stride(0) * p.element_size() for p in (self.left, self.right) if p is not None)
        starts = sum(start.nbytes for start in self.starts.values())
        return subspaces + sum(p.nbytes for p in (self.base, self.block) if p is not None) + starts

    @property
    def held(self) -> Shard:
        """The shard that this anchor covers: ``part``, or the whole weight."""
        return Shard.whole(self.shape) if self.part is None else self.part

    def pieces(self) -> dict[str, Tensor]:
        """Return the tensors that this form has, by attribute name."""
        named = {"left": self.left, "right": self.right, "base": self.base, "block": self.block}
        return {name: piece for name, piece in named.items() if piece is not None}

    def to(self, device: torch.device | str) -> Anchor:
        """Return the same anchor on ``device``; itself if it is there already."""
        moved = {name: piece.to(device) for name, piece in self.pieces().items()}
        if all(moved[name] is piece for name, piece in self.pieces().items()):
            return self
        changes: dict[str, Any] = {**moved, "starts": {name: start.to(device) for name, start in self.starts.items()}}
        return dataclasses.replace(self, **changes)

    def rebuilt_block(self, weight: Tensor) -> Anchor:
        """Return a block-form anchor whose block is recomputed from W0 by the backend in force.

        Backends round differently; the penalty is exactly 0 at W0 only with a block of the same arithmetic.

        Args:
            weight: W0 as it was anchored (not checked beyond shape, dtype, device and finiteness), on the anchor's
                device: of shape (m, n), or the values of the anchor's shard alone.

        Raises:
            ValueError: the anchor has no block, or ``weight`` is not of its shape, dtype and device.
        """
        if self.left is None or self.right is None or self.block is None:
            raise ValueError(f"anchor: got the {self.form} form, expected the block form: there is no block to rebuild")
        check_weight(weight, "weight", dimensions=len(self.held.local_shape))
        expected = self.held.local_shape
        if tuple(weight.shape) != expected or weight.dtype != self.weight_dtype or weight.device != self.device:
            raise ValueError(
                f"weight: got shape {tuple(weight.shape)}, {dtype_name(weight.dtype)} on {weight.device}, "
                f"expected {expected}, {dtype_name(self.weight_dtype)} on {self.device}: pass the weight "
                "that was anchored, and move the anchor to its device (anchor.to(weight.device))"
            )
        check_finite(weight.detach(), "weight")
        with torch.inference_mode(False), torch.no_grad():
            block, arithmetic = compute_block(weight.detach(), self.left, self.right, self.held)
        return self._with({**self.pieces(), "block": block}, arithmetic)

    def _with(self, pieces: dict[str, Tensor], arithmetic: str | None = None) -> Anchor:
        changes: dict[str, Any] = {**pieces, "arithmetic": arithmetic or self.arithmetic}
        return dataclasses.replace(self, **changes)

    def __repr__(self) -> str:
        part = "" if self.part is None else f"part={self.part}, "
        share = "" if self.share is None else f"share={self.share}, "
        control = "" if self.random_seed is None else f"subspace='random', random_seed={self.random_seed}, "
        return (
            f"Anchor(form={self.form!r}, shape={self.shape}, {part}weight_dtype={dtype_name(self.weight_dtype)}, "
            f"rank={self.rank}, {share}{control}energy={self.energy:.4f}, device='{self.device}', nbytes={self.nbytes})"
        )

    def _check_scalars(self) -> None:
        shape = tuple(self.shape) if isinstance(self.shape, (tuple, list)) else ()
        if len(shape) != 2 or not all(type(size) is int and size >= 1 for size in shape):
            raise ValueError(f"shape: got {self.shape!r}, expected (m, n), two positive ints")
        object.__setattr__(self, "shape", shape)
        if self.weight_dtype not in DTYPES:
            raise ValueError(
                f"weight_dtype: got {self.weight_dtype!r}, expected torch.bfloat16, torch.float16, "
                "torch.float32 or torch.float64"
            )
        check_rank(self.rank)
        if self.rank > min(shape):
            raise ValueError(f"rank: got {self.rank}, expected at most min{shape} = {min(shape)}")
        if not isinstance(self.energy, (int, float)) or not 0.0 <= self.energy <= 1.0:
            raise ValueError(f"energy: got {self.energy!r}, expected a number in [0, 1]")
        if self.share is not None and not (isinstance(self.share, float) and 0.0 < self.share < 1.0):
            raise ValueError(f"share: got {self.share!r}, expected a float strictly between 0 and 1, or None")
        if self.random_seed is not None:
            check_seed(self.random_seed, "random_seed")
        if self.arithmetic is not None and not isinstance(self.arithmetic, str):
            raise ValueError(f"arithmetic: got {self.arithmetic!r}, expected a str or None")
        for adapter, start in self.starts.items():
            if not isinstance(start, AdapterStart) or any(p.device != self.device for p in start.pieces().values()):
                raise ValueError(f"starts[{adapter!r}]: got {start!r}, expected an AdapterStart on {self.device}")
        if self.part is not None and self.part.shape != shape:
            raise ValueError(f"part: got {self.part}, expected a part of a weight of shape {shape}")

    def _check_form(self) -> None:
        present = set(self.pieces())
        if present not in ({"left", "right", "base"}, {"left", "right", "block"}, {"base"}):
            raise ValueError(
                f"anchor: got {', '.join(sorted(present)) or 'no pieces'}, expected left, right and base "
                "(base form), left, right and block (block form), or base alone (full form)"
            )
        if self.left is None and self.rank != min(self.shape):
            raise ValueError(
                f"rank: got {self.rank} without left and right, expected min{self.shape} = "
                f"{min(self.shape)}: a full anchor keeps every direction"
            )
        if self.left is None and self.random_seed is not None:
            raise ValueError(
                f"random_seed: got {self.random_seed!r} without left and right, expected None: a full anchor has no "
                "subspaces"
            )
        if self.arithmetic is not None and self.block is None:
            raise ValueError(
                f"arithmetic: got {self.arithmetic!r} without a block, expected None: it names what computed the block"
            )

    def _check_pieces(self) -> None:
        held = self.held
        shapes = {
            "left": (held.rows[1] - held.rows[0], self.rank),
            "right": (held.cols[1] - held.cols[0], self.rank),
            "base": held.local_shape,
            "block": (self.rank, self.rank) if held.numel else (0, 0),
        }
        for name, piece in self.pieces().items():
            check_weight(piece, name, dimensions=len(shapes[name]))
            if tuple(piece.shape) != shapes[name]:
                raise ValueError(
                    f"{name}: got shape {tuple(piece.shape)}, expected {shapes[name]} for a weight of shape "
                    f"{self.shape} at rank {self.rank}" + ("" if self.part is None else f", of which it has {held}")
                )
            if piece.device != self.device:
                raise ValueError(f"{name}: got a tensor on {piece.device}, expected {self.device} like the others")
            if piece.requires_grad:
                raise ValueError(
                    f"{name}: got a tensor that requires grad, expected a constant that nothing trains; "
                    f"pass {name}.detach().clone()"
                )
            self._check_dtype(name, piece.dtype)
            check_finite(piece, name)

    def _check_dtype(self, name: str, dtype: torch.dtype) -> None:
        if name in ("left", "right"):
            check_basis_dtype(dtype, self.weight_dtype, name)
            if self.left is not None and dtype != self.left.dtype:
                raise ValueError(f"right: got {dtype_name(dtype)}, expected {dtype_name(self.left.dtype)} like left")
            return
        wide = torch.float64 if self.weight_dtype == torch.float64 else torch.float32
        expected = {torch.bfloat16, self.weight_dtype} if name == "base" else {wide}
        if dtype not in expected:
            raise ValueError(
                f"{name}: got {dtype_name(dtype)}, expected {' or '.join(sorted(map(dtype_name, expected)))} "
                f"for {dtype_name(self.weight_dtype)} weights"
            )
