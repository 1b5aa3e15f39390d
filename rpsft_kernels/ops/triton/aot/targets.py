"""What kernels are compiled for: lists of architectures, read. The standard library alone: setup.py imports this file
where there is no torch.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CAPABILITIES = (80, 86, 87, 89, 90, 100, 103, 120, 121)
AMD = ("gfx942",)
# Containers name them beside the others: no reason to refuse an installation.
_TOO_OLD = (35, 37, 50, 52, 53, 60, 61, 62, 70, 72, 75)
_UNTRIED = (88, 110)
# Newest first: a device takes the table of the newest architecture that is not newer than itself.
_TABLES = ((120, "sm_120"), (100, "sm_100"), (90, "sm_90"), (86, "sm_86"), (80, "sm_80"))


class Target(NamedTuple):
    """What to compile for. ``architecture``: Triton's name; ``arch``: what the machine code is for (``sm_90a``: 9.0
    alone); ``table``: the tile shapes; ``ptx``: keep PTX too.
    """

    architecture: str
    arch: str
    table: str
    ptx: bool


def cuda_architecture(capability: int) -> str:
    """The tile table that serves a CUDA compute capability (``90`` for 9.0)."""
    for number, name in _TABLES:
        if capability >= number:
            return name
    raise ValueError(f"compute capability {capability / 10:.1f}: the kernels need 8.0 (bfloat16 tensor cores) or newer")


def parse_architectures(text: str, source: str = "architectures") -> list[Target]:
    """The targets that a list names: ``"8.0;9.0a 10.0+PTX,gfx942"``.

    Triton compiles 9.0 and newer for that architecture alone ("9.0" and "9.0a" are the same). PTX is kept where it is
    asked for, and for the newest target whose PTX newer GPUs can translate. Capabilities that no kernel is compiled for
    are left out (:func:`left_out`).

    Args:
        text: architectures, separated by semicolons, commas or spaces.
        source: where the list is from: the error's first word.

    Raises:
        ValueError: an unknown architecture, or none that kernels can be compiled for.
    """
    targets: dict[str, Target] = {}
    for word in _words(text):
        if _skipped(word):
            continue
        name, ptx = word.removesuffix("+PTX"), word.endswith("+PTX")
        target = _target(name, ptx)
        if target is None or (ptx and name in AMD):
            raise ValueError(f"{source}: got {word!r}, {_expected()}")
        earlier = targets.get(target.architecture)
        targets[target.architecture] = target if earlier is None or ptx else earlier
    if not targets:
        raise ValueError(f"{source}: got {text!r}, {_expected()}")
    portable = [t.architecture for t in targets.values() if t.arch not in AMD and not t.arch.endswith("a")]
    for architecture in portable:
        if architecture == max(portable):
            targets[architecture] = targets[architecture]._replace(ptx=True)
    return sorted(targets.values(), key=lambda target: (target.arch in AMD, len(target.architecture), target))


def left_out(text: str) -> list[str]:
    """The words of a list that name GPUs which no kernel is compiled for."""
    return [word for word in _words(text) if _skipped(word)]


def _words(text: str) -> list[str]:
    return re.split(r"[;,\s]+", text.strip(" \t\r\n;,"))


def _skipped(word: str) -> bool:
    found = re.fullmatch(r"(\d+)\.(\d)a?(\+PTX)?", word)
    return found is not None and int(found[1] + found[2]) in _TOO_OLD + _UNTRIED


def _target(name: str, ptx: bool) -> Target | None:
    if name in AMD:
        return Target(name, name, name, False)
    found = re.fullmatch(r"(\d+)\.(\d)(a?)", name)
    number = int(found[1] + found[2]) if found else 0
    if found is None or number not in CAPABILITIES or (found[3] and number < 90):
        return None
    suffix = "a" if number >= 90 else ""
    return Target(f"sm_{number}", f"sm_{number}{suffix}", cuda_architecture(number), ptx)


def _expected() -> str:
    known = ", ".join(f"{n // 10}.{n % 10}" + ("(a)" if n >= 90 else "") for n in CAPABILITIES)
    names = f"{known} (each with +PTX or without) and {', '.join(AMD)}"
    return f"expected some of {names}, separated by semicolons, commas or spaces"
