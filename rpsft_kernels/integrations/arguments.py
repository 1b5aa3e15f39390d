"""The options of a RotationPenalty as a dataclass, for HfArgumentParser, TrlParser and configuration files."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..training import RotationPenalty


# Annotations are read by parsers: no names that stand in TYPE_CHECKING alone.
@dataclass
class RotationArguments:
    """Options of the rotation penalty; without a rank and a path there is none."""

    rotation_rank: float | None = field(
        default=None,
        metadata={"help": "directions kept of each weight (64), or their share of its energy (0.9)"},
    )
    rotation_coeff: float = field(default=1.0, metadata={"help": "the paper's lambda"})
    rotation_warmup: int = field(default=0, metadata={"help": "steps from 0 to the coefficient"})
    rotation_budget: float | None = field(
        default=None, metadata={"help": "relative rotation to stay at, in place of the coefficient"}
    )
    rotation_mode: str = field(
        default="gradient",
        metadata={"help": "gradient (before clipping), decoupled or project (after the step)"},
    )
    rotation_include: list[str] | None = field(default=None, metadata={"help": "patterns of weights to anchor"})
    rotation_exclude: list[str] | None = field(default=None, metadata={"help": "patterns of weights not to anchor"})
    rotation_path: str | None = field(
        default=None, metadata={"help": "file of the anchors: loaded where it exists, else written once"}
    )
    rotation_per_layer: bool = field(default=False, metadata={"help": "log R of each weight"})


def from_arguments(arguments: RotationArguments) -> RotationPenalty | None:
    """Return the penalty that the arguments ask for; None where they ask for none.

    Raises:
        ValueError: for a rank that is neither a whole number nor a share, and whatever ``RotationPenalty`` refuses.
    """
    rank: float | int | None = arguments.rotation_rank
    if rank is None and arguments.rotation_path is None:
        changed = [
            name
            for name, option in RotationArguments.__dataclass_fields__.items()
            if getattr(arguments, name) != option.default
        ]
        if changed:
            raise ValueError(f"rotation_rank: got none beside {', '.join(changed)}, expected a rank: rotation_rank=64")
        return None
    if rank is not None and rank >= 1:
        if rank != int(rank):
            raise ValueError(
                f"rotation_rank: got {rank}, expected a whole number of directions, or a share between 0 and 1"
            )
        rank = int(rank)
    return RotationPenalty(
        rank,
        arguments.rotation_coeff,
        warmup=arguments.rotation_warmup,
        budget=arguments.rotation_budget,
        mode=arguments.rotation_mode,  # type: ignore[arg-type]
        include=arguments.rotation_include,
        exclude=arguments.rotation_exclude,
        path=arguments.rotation_path,
        per_layer=arguments.rotation_per_layer,
    )
