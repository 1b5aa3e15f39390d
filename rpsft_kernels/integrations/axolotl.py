"""The rotation penalty in axolotl, as a plugin::

    plugins: [rpsft_kernels.integrations.axolotl.RotationPenaltyPlugin]
    rotation: {rank: 64, coeff: 1.0}

The options are those of :class:`RotationArguments`, without ``rotation_``.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from .arguments import RotationArguments, from_arguments
from .transformers import attach

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel
except ImportError as error:
    raise ImportError("rpsft_kernels.integrations.axolotl needs axolotl: pip install axolotl") from error

_PREFIX = "rotation_"


class RotationPenaltyConfig(BaseModel):
    """What the plugin reads of a configuration."""

    rotation: dict[str, Any] | None = None


class RotationPenaltyPlugin(BasePlugin):
    """Gives axolotl's trainer the penalty that ``rotation:`` asks for; without it, none."""

    def get_input_args(self) -> str:
        return f"{__name__}.{RotationPenaltyConfig.__name__}"

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        penalty = from_arguments(read_options(cfg.get("rotation")))
        if penalty is not None:
            attach(trainer, penalty)


def read_options(options: Any) -> RotationArguments:
    """Return the arguments for the options of a configuration file.

    Raises:
        ValueError: an option is none of the penalty's.
    """
    known = [field.name.removeprefix(_PREFIX) for field in fields(RotationArguments)]
    unknown = sorted(set(options or ()) - set(known))
    if unknown:
        raise ValueError(f"rotation: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    return RotationArguments(**{f"{_PREFIX}{name}": value for name, value in dict(options or {}).items()})
