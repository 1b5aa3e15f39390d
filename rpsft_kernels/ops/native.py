"""The compiled CPU engine's place among the backends; this version of the package carries none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_REASON = "this installation carries no compiled CPU engine"


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    return _REASON


def arithmetic(device: torch.device) -> NoReturn:
    raise ValueError(f"backend 'native': {_REASON}")


def project_drift(
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    blocks: Sequence[Tensor],
) -> NoReturn:
    raise ValueError(f"backend 'native': {_REASON}")


def pull_back_into(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    bases: Sequence[Tensor],
    drifts: Sequence[Tensor],
    scales: Tensor,
    accumulate: bool,
) -> NoReturn:
    raise ValueError(f"backend 'native': {_REASON}")
