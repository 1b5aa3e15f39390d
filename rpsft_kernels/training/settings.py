"""What a user asks of a rotation penalty, checked when it is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsFloat, get_args

import torch

from ..anchors.collection import Anchors
from ..checks import read_coeff

Mode = Literal["gradient", "decoupled", "project"]
MODES: tuple[Mode, ...] = get_args(Mode)
Coefficient = SupportsFloat | Callable[[int], SupportsFloat]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The arguments of :class:`RotationPenalty`, under the same names.

    Raises:
        ValueError: one of them is invalid, or two exclude each other.
    """

    rank: int | float | None
    coeff: Coefficient
    warmup: int
    budget: float | None
    mode: Mode
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    keep_base: bool | None
    basis_dtype: torch.dtype
    anchors: Anchors | None
    path: str | os.PathLike[str] | None
    log_every: int
    per_layer: bool

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, expected one of {', '.join(map(repr, MODES))}")
        self._check_rank()
        self._check_strength()
        if self.anchors is not None and not isinstance(self.anchors, Anchors):
            raise ValueError(
                f"anchors: got {type(self.anchors).__name__}, expected Anchors (Anchors.from_model(model, rank) or "
                "Anchors.load(path)), or None and a rank"
            )
        for name in ("include", "exclude", "path"):
            if self.anchors is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} beside anchors, expected None: anchors that are given are "
                    "taken as they are; make them so (Anchors.from_model), or leave them out"
                )
        if self.path is not None and not isinstance(self.path, (str, os.PathLike)):
            raise ValueError(f"path: got {type(self.path).__name__}, expected a file's path or None")
        if type(self.log_every) is not int or self.log_every < 1:
            raise ValueError(f"log_every: got {self.log_every!r}, expected an int of at least 1, in steps")

    def _check_rank(self) -> None:
        rank = self.rank
        if rank is None:
            if self.anchors is None and self.path is None:
                raise ValueError(
                    "rank: got None without anchors or a path, expected an int k of at least 1 (the paper takes 768), "
                    "or a share of energy between 0 and 1"
                )
        elif isinstance(rank, bool) or not (
            (isinstance(rank, int) and rank >= 1) or (isinstance(rank, float) and 0.0 < rank < 1.0)
        ):
            raise ValueError(
                f"rank: got {rank!r}, expected an int k of at least 1 (the paper takes 768), or a float between 0 and "
                "1, the share of each weight's energy that its subspaces hold"
            )

    def _check_strength(self) -> None:
        if type(self.warmup) is not int or self.warmup < 0:
            raise ValueError(f"warmup: got {self.warmup!r}, expected an int of at least 0, in steps")
        if not callable(self.coeff) and read_coeff(self.coeff) < 0:
            raise ValueError(f"coeff: got {self.coeff!r}, expected at least 0: a negative one rewards rotation")
        if self.budget is None:
            if self.mode == "project":
                raise ValueError(
                    "budget: got None in mode 'project', expected the relative rotation to stay below, less than what "
                    "the metric rotation/relative reaches with coeff=0.0: this mode has no other strength"
                )
            return
        if isinstance(self.budget, bool) or not isinstance(self.budget, (int, float)):
            raise ValueError(f"budget: got {self.budget!r}, expected a number such as 0.001, or None")
        if not (math.isfinite(self.budget) and self.budget > 0):
            raise ValueError(
                f"budget: got {self.budget!r}, expected a positive number such as 0.001: the relative rotation "
                "sqrt(R / sum sigma^2) to stay below"
            )
        if callable(self.coeff) or self.coeff != 1.0:
            raise ValueError(
                f"coeff: got {self.coeff!r} beside budget={self.budget!r}, expected one of the two: a budget finds "
                "its coefficient itself"
            )
        if self.warmup:
            raise ValueError(
                f"warmup: got {self.warmup} beside budget={self.budget!r}, expected 0: a budget's coefficient has a "
                "start of its own"
            )

    def anchor_options(self) -> dict[str, Any]:
        """Return the keyword arguments of ``Anchors.from_model``; what the user left open stays its default."""
        options: dict[str, Any] = {"include": self.include, "exclude": self.exclude, "basis_dtype": self.basis_dtype}
        if self.keep_base is not None:
            options["keep_base"] = self.keep_base
        return options
