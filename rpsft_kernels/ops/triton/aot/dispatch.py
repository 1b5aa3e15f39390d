"""Finds the kernel compiled ahead of time that serves a launch, and starts it without a compiler or the triton package.

``rpsft_kernels/kernels/`` holds machine code and ``manifest.json`` if the package was built with kernels (``build``).
RPSFT_AOT says how they are used: ``1`` (default) uses a kernel if one matches and leaves the rest to Triton, ``0``
leaves everything to Triton, ``only`` never compiles.

A device uses machine code of its own architecture, else of a compatible one, else PTX, else what Triton compiles. An
image that its driver refuses is skipped from then on. Launches are planned with the tile table of the code in use.

Functions that report why something does not work return ``str | None``; None means that nothing is wrong.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import toolchain
from .library import FOLDER, Device, KernelMatch, Library, Refused, ServedTable
from .loader import kernel, launcher, launcher_missing
from .targets import BY_CAPABILITY, BY_TABLE, Compatibility, format_capability

if TYPE_CHECKING:
    from ..variants import Variant


class NoKernel(RuntimeError):
    """This installation carries no kernel for a launch, and no kernel may or can be compiled."""


class ImageRefused(RuntimeError):
    """The driver refuses a kernel's image; another image of the same kernel may serve."""


_MODES = ("0", "1", "only")
_NOTHING: Refused = frozenset()
_log = logging.getLogger("rpsft_kernels")
_lock = threading.Lock()
_logged: set[tuple[int, str]] = set()
# The kinds of images that each device's driver has refused, and its messages.
_refused: dict[int, Refused] = {}
_reasons: dict[int, list[str]] = {}


def mode() -> str:
    """The environment variable RPSFT_AOT: ``"0"``, ``"1"`` or ``"only"``."""
    value = os.environ.get("RPSFT_AOT", "") or "1"
    if value not in _MODES:
        raise ValueError(f"environment variable RPSFT_AOT: got {value!r}, expected 0, 1 or only")
    return value


def installed_library() -> Library | None:
    """The kernels of this installation, if there are any: see :func:`kernels_missing`."""
    return _open_installed()[0]


def kernels_missing() -> str | None:
    """Why this installation has no kernels."""
    return _open_installed()[1]


@lru_cache(maxsize=1)
def _open_installed() -> tuple[Library | None, str | None]:
    try:
        return Library.open(FOLDER), None
    except ValueError as error:
        return None, str(error)


def unusable() -> str | None:
    """Why launches do not use the kernels of this installation."""
    if mode() == "0":
        return "RPSFT_AOT=0"
    if torch.version.hip is not None:
        return "kernels compiled ahead of time are launched on CUDA devices only"
    return kernels_missing() or launcher_missing()


def _usable_library() -> Library | None:
    return installed_library() if unusable() is None else None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache(maxsize=64)
def _device_facts(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    # Without a driver nothing is launched, so the shared memory that every supported device has is good enough.
    driver, shared = 0, min(row.block_shared for row in BY_CAPABILITY.values())
    native = launcher()
    if native is not None:
        try:
            driver = native.driver_version()
            # Older versions of torch do not have this property.
            shared = getattr(properties, "shared_memory_per_block_optin", 0) or native.shared_memory_per_block(index)
        except (AttributeError, RuntimeError):
            driver = 0
    return Device(capability, shared, driver)


def can_compile() -> bool:
    """Whether a variant that no kernel serves may and can be compiled for a GPU."""
    return mode() != "only" and toolchain.jit_missing() is None


def unavailable(device: torch.device) -> str | None:
    """Why no tile table of this installation's kernels serves a CUDA device."""
    library = _usable_library()
    if library is None:
        return unusable()
    index = _index(device)
    facts, refused = _device_facts(index), _refused.get(index, _NOTHING)
    if _served_tables(library, facts, refused):
        return None
    reason = (
        f"this installation's kernels ({library.arch_names()}) do not run on compute capability "
        f"{format_capability(facts.capability)}"
    )
    obstacles = [library.obstacles(facts, refused), *_reasons.get(index, [])]
    return "; ".join([reason, *filter(None, obstacles)])


def served_table(device: torch.device, own: str, tuned: str | None) -> ServedTable | None:
    """The tile table whose kernels serve the launches on a CUDA device; None if Triton compiles them.

    This is the device's own table if its kernels are installed, else the newest older table whose kernels all run
    there.

    Args:
        device: the device.
        own: the device's own tile table.
        tuned: the table that RPSFT_TILES changes, if any. The installed kernels do not have its tile shapes.
    """
    library = _usable_library()
    if library is None or tuned == own:
        return None
    index = _index(device)
    return _served_table(library, _device_facts(index), _refused.get(index, _NOTHING), own, tuned)


def table_for(device: torch.device, own: str, tuned: str | None = None) -> str:
    """The tile table that launches on a CUDA device are planned with."""
    served = served_table(device, own, tuned)
    return own if served is None else served.table


@lru_cache(maxsize=256)
def _served_tables(library: Library, facts: Device, refused: Refused) -> list[ServedTable]:
    return library.served_tables(facts, refused)


@lru_cache(maxsize=256)
def _served_table(library: Library, facts: Device, refused: Refused, own: str, tuned: str | None) -> ServedTable | None:
    newest = BY_TABLE[own].capability
    tables = [
        each for each in _served_tables(library, facts, refused) if each.capability <= newest and each.table != tuned
    ]
    # max() returns the first of equals, and the tables that run best come first.
    return max(tables, key=lambda each: each.capability, default=None)


@lru_cache(maxsize=4096)
def _find(library: Library, variant: Variant, facts: Device, refused: Refused) -> KernelMatch | None:
    return library.find(variant, facts, refused)


@lru_cache(maxsize=4096)
def _explain_no_match(library: Library, variant: Variant, facts: Device, refused: Refused) -> str | None:
    return library.explain_no_match(variant, facts, refused)


def bind(
    variant: Variant, programs: int, device: torch.device, arguments: Sequence[Tensor]
) -> Callable[[], None] | None:
    """The function that starts ``programs`` > 0 programs of a variant on the stream of a GPU that is current now.

    None if no kernel serves the launch and Triton is to compile it. The tensors must outlive the function.

    Raises (binding):
        NoKernel: no kernel serves the launch, and no kernel may or can be compiled.
        RuntimeError: the kernel's file is missing, or is not the one that the manifest describes.

    Raises (starting):
        ImageRefused: the driver refuses the kernel's image, which is skipped from now on: bind anew.
        RuntimeError: the driver could not start it.
    """
    index = _index(device)
    library = _usable_library()
    if library is None:
        _fall_back_to_jit(index, "none", variant, unusable())
        return None
    facts, refused = _device_facts(index), _refused.get(index, _NOTHING)
    match = _find(library, variant, facts, refused)
    if match is None:
        reason = _explain_no_match(library, variant, facts, refused)
        why = f"compute capability {format_capability(facts.capability)}: {reason}"
        _fall_back_to_jit(index, "no match", variant, "; ".join([why, *_reasons.get(index, [])]))
        return None
    values = []
    for argument, tensor in zip(match.entry["arguments"], arguments, strict=True):
        value = tensor.data_ptr()
        if value % argument["divisibility"]:
            why = f"its argument {argument['name']} is not aligned to {argument['divisibility']} bytes"
            _fall_back_to_jit(index, "misaligned", variant, why)
            return None
        values.append(value)
    # The scratch memory lives as long as the function that is returned.
    scratch, size, alignment = None, match.entry["scratch"]["size"], match.entry["scratch"]["alignment"]
    if size:
        scratch = _descriptor_scratch(size * programs + alignment, torch.device("cuda", index))
    # Triton adds two parameters after the declared ones: scratch memory, and the profiler's memory.
    values += [0 if scratch is None else -(-scratch.data_ptr() // alignment) * alignment, 0]
    how = _describe(match, facts)
    try:
        start = kernel(library, match, variant.label()).launch
    except RuntimeError as error:
        raise _add_origin(error, how) from error
    stream, grid = torch.cuda.current_stream(device).cuda_stream, (programs, 1, 1)
    load_error = launcher().LoadError
    served = f"cuda:{index}: kernels compiled ahead of time, {how}"

    def queue() -> None:
        try:
            start(index, stream, grid, values)
        except load_error as error:
            _skip_image(index, match, facts, str(error))
            raise ImageRefused(str(error)) from error
        except RuntimeError as error:
            raise _add_origin(error, how) from error
        _log_once(index, match.compatibility.value, served)
        # The closure keeps the scratch memory, whose address is among the values.
        _ = scratch

    return queue


def _add_origin(error: RuntimeError, how: str) -> RuntimeError:
    """The error with a note on where the code came from, and the way out."""
    return RuntimeError(f"{error} (compiled ahead of time, {how}; RPSFT_AOT=0 leaves kernels to Triton)")


def _descriptor_scratch(size: int, device: torch.device) -> Tensor:
    # Programs put their descriptors here. Machine code writes a descriptor by atomic exchanges and discards the values
    # that they return. A sanitizer may report this as a read of memory that was never written; the values are not used.
    return torch.empty(size, dtype=torch.int8, device=device)


def _skip_image(index: int, match: KernelMatch, facts: Device, error: str) -> None:
    """Skip all images of this kind on a device from now on: a driver that refuses one refuses the others too."""
    arch, kind = match.entry["arch"], "PTX" if match.compatibility is Compatibility.PTX else "machine code"
    with _lock:
        refused = _refused.get(index, _NOTHING)
        if (arch, match.compatibility) in refused:
            return
        _refused[index] = refused | {(arch, match.compatibility)}
        _reasons[index] = [*_reasons.get(index, []), f"the driver refused {arch} {kind}: {error}"]
    _log.warning(
        f"cuda:{index}: {arch} {kind} compiled ahead of time is passed over on compute capability "
        f"{format_capability(facts.capability)}: {error}"
    )


def _fall_back_to_jit(index: int, kind: str, variant: Variant, reason: str | None) -> None:
    """Leave a launch to Triton, and log the reason once for each ``kind``.

    Raises:
        NoKernel: Triton may not or cannot compile it.
    """
    if mode() == "only":
        way_out = "RPSFT_AOT=1 lets Triton compile it"
    elif missing := toolchain.jit_missing():
        way_out = f"it cannot be compiled: {missing}"
    else:
        _log_once(index, f"jit, {kind}", f"cuda:{index}: Triton compiles {variant.label()}: {reason}")
        return
    raise NoKernel(f"no kernel compiled ahead of time for {variant.label()} on cuda:{index}: {reason}; {way_out}")


def _describe(match: KernelMatch, facts: Device) -> str:
    arch, capability = match.entry["arch"], format_capability(facts.capability)
    tiles = f"with the tiles of {match.entry['table']}"
    return {
        Compatibility.EXACT: f"{arch} machine code on compute capability {capability}",
        Compatibility.SAME_MAJOR: f"{arch} machine code, which compute capability {capability} runs too, {tiles}",
        Compatibility.PTX: f"{arch} PTX, which the driver translates for compute capability {capability}, {tiles}",
    }[match.compatibility]


def _log_once(index: int, kind: str, message: str) -> None:
    if (index, kind) in _logged:
        return
    with _lock:
        if (index, kind) in _logged:
            return
        _logged.add((index, kind))
    _log.info(message)
