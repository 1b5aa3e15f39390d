"""For which GPUs an installation or a wheel is to carry kernels: what RPSFT_CUDA_ARCHS says, and what this machine has.

The standard library alone: setup.py and the build backend ask before torch or Triton can be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .devices import NoDevices, compute_capabilities
from .targets import AMD, CAPABILITIES, Target, left_out, parse_architectures

VARIABLE = "RPSFT_CUDA_ARCHS"
NATIVE = "native"


class Wanted(NamedTuple):
    """What to compile. ``words``: the list or ``native`` that says so; ``required``: without these kernels there is no
    package; ``notes``: lines that say what is not compiled, and why.
    """

    targets: tuple[Target, ...] = ()
    words: str = ""
    required: bool = False
    notes: tuple[str, ...] = ()

    @property
    def launched(self) -> bool:
        """Whether there is anything among it that the package's own launcher starts."""
        return any(target.arch not in AMD for target in self.targets)


def wanted(environ: Mapping[str, str]) -> Wanted:
    """What a build of the package compiles, by its environment.

    RPSFT_CUDA_ARCHS is a list of architectures, ``native`` (this machine's GPUs), or ``none`` or ``0``. Unset, this
    machine's GPUs are compiled for where there are some, and the package is installed without kernels where that fails.
    RPSFT_STRICT=1 makes such a failure an error.

    Raises:
        ValueError: what the variables say cannot be done; the message names the variable.
    """
    text, required = environ.get(VARIABLE, "").strip(), strict(environ)
    if text.lower() in ("0", "none"):
        return Wanted()
    if text:
        try:
            return named(text, VARIABLE)
        except ValueError as error:
            raise ValueError(f"{error}; {VARIABLE}=none builds without kernels") from None
    if environ.get("RPSFT_AOT_PREBUILT", "").strip():
        raise ValueError(
            f"RPSFT_AOT_PREBUILT: got a folder of kernels, expected {VARIABLE} beside it; name the architectures that "
            "it was built for"
        )
    if environ.get("RPSFT_NATIVE", "") == "0":
        return Wanted(notes=("no kernels are compiled: RPSFT_NATIVE=0 leaves out what launches them",))
    try:
        targets, notes = _found()
    except NoDevices as error:
        return Wanted(notes=(f"no kernels are compiled: {error}",))
    return Wanted(targets, NATIVE, required, notes) if targets else Wanted(notes=notes)


def named(text: str, source: str) -> Wanted:
    """What a list of architectures, or ``native``, asks for.

    Raises:
        ValueError: it names something unknown, nothing that kernels are compiled for, or GPUs that are not there.
    """
    if text.strip().lower() != NATIVE:
        notes = tuple(f"{source}: no kernels are compiled for {word}" for word in left_out(text))
        return Wanted(tuple(parse_architectures(text, source)), text, True, notes)
    try:
        targets, notes = _found()
    except NoDevices as error:
        raise ValueError(f"{source}: got {text!r}, and {error}; name architectures, such as 9.0") from None
    if not targets:
        raise ValueError(f"{source}: got {text!r}, and {'; '.join(notes)}; name architectures, such as 9.0")
    return Wanted(targets, NATIVE, True, notes)


def strict(environ: Mapping[str, str]) -> bool:
    """The environment variable RPSFT_STRICT: whether a kernel that cannot be kept, or any failure, is an error."""
    value = environ.get("RPSFT_STRICT", "") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"environment variable RPSFT_STRICT: got {value!r}, expected 0 or 1")
    return value == "1"


def _found() -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Targets for this machine's GPUs, and what is said of GPUs that no kernel is compiled for."""
    capabilities = [(n, f"{n // 10}.{n % 10}") for n in compute_capabilities()]
    notes = tuple(
        f"no kernels are compiled for this machine's GPU of compute capability {name}"
        for number, name in capabilities
        if number not in CAPABILITIES
    )
    names = [name for number, name in capabilities if number in CAPABILITIES]
    # No PTX: it is for GPUs that are not here.
    targets = parse_architectures(" ".join(names)) if names else []
    return tuple(target._replace(ptx=False) for target in targets), notes
