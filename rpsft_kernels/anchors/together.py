"""What one rank alone cannot do, every rank refuses: nobody waits for a rank that has raised."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn

from ..checks import DTYPES
from ..distributed import find_parameters


def find_groups(model: nn.Module) -> dict[str, dist.ProcessGroup]:
    """Return the groups of processes that hold the weights of ``model``, by name, in the order of its parameters."""
    groups: dict[str, dist.ProcessGroup] = {}
    for name, reference in find_parameters(model).items():
        try:
            if len(reference.shape) != 2 or reference.parameter.dtype not in DTYPES:
                continue
            weight = reference.locate(name)
        except (RuntimeError, ValueError):
            # A parameter that cannot be anchored (a lazy one, for example), or a refusal that names it later.
            continue
        if weight.group is not None:
            groups.setdefault(weight.group_name, weight.group)
    return groups


@contextmanager
def refuse_together(groups: Mapping[str, dist.ProcessGroup], what: str) -> Iterator[None]:
    """Let every rank of ``groups`` raise where one does within the block, in which no rank talks to another.

    Args:
        groups: as :func:`find_groups` returns them. A rank of several tells all of them, in the second round at the
            latest.
        what: begins the message of the other ranks.

    Raises:
        ValueError: another rank has raised; the message names it.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    problem = "" if own is None else f"{what}: rank {dist.get_rank() if groups else 0}: {own}"
    # As many rounds on every rank: how many groups the others are in, a rank does not know.
    for _ in range(2):
        for group in groups.values():
            problems: list[Any] = [None] * group.size()
            dist.all_gather_object(problems, problem, group=group)
            problem = problem or next((told for told in problems if told), "")
    if own is not None:
        raise own
    if problem:
        raise ValueError(problem)
