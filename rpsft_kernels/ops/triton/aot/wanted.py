"""Decides for which GPUs an installation or a wheel carries kernels: RPSFT_CUDA_ARCHS, else this machine's GPUs.

This file needs only the standard library: setup.py and the build backend use it before torch or Triton can be imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from .devices import NoDevices, compute_capabilities
from .targets import BY_CAPABILITY, Target, format_capability, parse_architectures, skipped_words

VARIABLE = "RPSFT_CUDA_ARCHS"
NATIVE = "native"


class WantedTargets(NamedTuple):
    """The architectures to compile kernels for.

    Attributes:
        targets: the architectures.
        words: the user's list, or ``native``.
        required: whether the build of the package fails without these kernels.
        notes: lines to print about kernels that are not compiled, with the reasons.
    """

    targets: tuple[Target, ...] = ()
    words: str = ""
    required: bool = False
    notes: tuple[str, ...] = ()

    @property
    def launchable(self) -> bool:
        """Whether the package's own launcher can start any of it."""
        return any(target.generation.is_nvidia for target in self.targets)


def wanted_targets(environ: Mapping[str, str]) -> WantedTargets:
    """The architectures that a build of the package compiles kernels for in this environment.

    RPSFT_CUDA_ARCHS is a list of architectures, ``native`` (this machine's GPUs), or ``none`` or ``0``. If it is unset,
    kernels are compiled for this machine's GPUs, if it has any; if that fails, the package is installed without
    kernels. RPSFT_STRICT=1 makes such a failure an error.

    Raises:
        ValueError: the variables ask for something impossible; the message names the variable.
    """
    text, required = environ.get(VARIABLE, "").strip(), is_strict(environ)
    if text.lower() in ("0", "none"):
        return WantedTargets()
    if text:
        try:
            return parse_wanted(text, VARIABLE)
        except ValueError as error:
            raise ValueError(f"{error}; {VARIABLE}=none builds without kernels") from None
    if environ.get("RPSFT_AOT_PREBUILT", "").strip():
        raise ValueError(
            f"RPSFT_AOT_PREBUILT: got a folder of kernels, expected {VARIABLE} beside it; name the architectures that "
            "it was built for"
        )
    if environ.get("RPSFT_NATIVE", "") == "0":
        return WantedTargets(notes=("no kernels are compiled: RPSFT_NATIVE=0 leaves out what launches them",))
    try:
        targets, notes = _native_targets()
    except NoDevices as error:
        return WantedTargets(notes=(f"no kernels are compiled: {error}",))
    return WantedTargets(targets, NATIVE, required, notes) if targets else WantedTargets(notes=notes)


def parse_wanted(text: str, source: str) -> WantedTargets:
    """The targets that a list of architectures, or ``native``, asks for.

    Raises:
        ValueError: the list has an unknown word or names nothing that kernels are compiled for, or ``native`` and there
            are no such GPUs.
    """
    if text.strip().lower() != NATIVE:
        notes = tuple(f"{source}: no kernels are compiled for {word}" for word in skipped_words(text))
        return WantedTargets(tuple(parse_architectures(text, source)), text, True, notes)
    try:
        targets, notes = _native_targets()
    except NoDevices as error:
        raise ValueError(f"{source}: got {text!r}, and {error}; name architectures, such as 9.0") from None
    if not targets:
        raise ValueError(f"{source}: got {text!r}, and {'; '.join(notes)}; name architectures, such as 9.0")
    return WantedTargets(targets, NATIVE, True, notes)


def is_strict(environ: Mapping[str, str]) -> bool:
    """The environment variable RPSFT_STRICT: whether a kernel that is left out, or any failure, is an error."""
    value = environ.get("RPSFT_STRICT", "") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"environment variable RPSFT_STRICT: got {value!r}, expected 0 or 1")
    return value == "1"


def _native_targets() -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """Targets for this machine's GPUs, and notes about GPUs that no kernel is compiled for."""
    capabilities = compute_capabilities()
    notes = tuple(
        f"no kernels are compiled for this machine's GPU of compute capability {format_capability(capability)}"
        for capability in capabilities
        if capability not in BY_CAPABILITY
    )
    # PTX would be for GPUs that are not here.
    rows = [BY_CAPABILITY[capability] for capability in capabilities if capability in BY_CAPABILITY]
    return tuple(Target(row, ptx=False) for row in rows), notes
