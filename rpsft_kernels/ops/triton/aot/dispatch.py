"""Kernels compiled ahead of time: which one serves a launch, and its start without a compiler or the triton package.

``rpsft_kernels/kernels/`` holds machine code and ``manifest.json`` where the package was built with them
(``build``). RPSFT_AOT says what is made of them: ``1`` (default) takes a kernel where one matches and leaves the rest
to Triton, ``0`` leaves all to Triton, ``only`` never compiles.

A device takes machine code of its own architecture, else of a compatible one, else PTX, else what Triton compiles; what
its driver refuses is passed over from then on. Launches are planned with the tile table of the code that serves.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import toolchain
from .library import FOLDER, Choice, Device, Library, Refused, Service
from .loader import binding, kernel

if TYPE_CHECKING:
    from ..variants import Variant


class NoKernel(RuntimeError):
    """This installation carries no kernel for a launch, and nothing may or can compile one."""


_MODES = ("0", "1", "only")
_NOTHING: Refused = frozenset()
_log = logging.getLogger("rpsft_kernels")
_lock = threading.Lock()
_said: set[tuple[int, str]] = set()
# By device: what its driver has refused, and its words.
_refused: dict[int, Refused] = {}
_reasons: dict[int, list[str]] = {}


def mode() -> str:
    """The environment variable RPSFT_AOT: ``"0"``, ``"1"`` or ``"only"``."""
    value = os.environ.get("RPSFT_AOT", "") or "1"
    if value not in _MODES:
        raise ValueError(f"environment variable RPSFT_AOT: got {value!r}, expected 0, 1 or only")
    return value


@lru_cache(maxsize=1)
def installed() -> Library | str:
    """The kernels of this installation, or why there are none."""
    try:
        return Library.open(FOLDER)
    except ValueError as error:
        return str(error)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


@lru_cache(maxsize=64)
def _facts(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    launcher = binding()
    try:
        driver = launcher.driver_version()
        # Older versions of torch do not tell.
        shared = getattr(properties, "shared_memory_per_block_optin", 0) or launcher.shared_memory_per_block(index)
    except (AttributeError, RuntimeError):
        # Without a driver nothing is launched, whatever is said here: this is what every supported device has.
        driver, shared = 0, 99 << 10
    return Device(properties.major * 10 + properties.minor, shared, driver)


def _usable() -> Library | str:
    """The installation's kernels, or what stands against using any."""
    if mode() == "0":
        return "RPSFT_AOT=0"
    if torch.version.hip is not None:
        return "kernels compiled ahead of time are launched on CUDA devices only"
    library = installed()
    if isinstance(library, str):
        return library
    launcher = binding()
    return launcher if isinstance(launcher, str) else library


def compiles() -> bool:
    """Whether a variant without a kernel may and can be compiled for a GPU."""
    return mode() != "only" and not toolchain.jit_missing()


def unavailable(device: torch.device) -> str | None:
    """Why no kernel of this installation serves a CUDA device, or None where at least one tile table's do."""
    library = _usable()
    if isinstance(library, str):
        return library
    index = _index(device)
    facts, refused = _facts(index), _refused.get(index, _NOTHING)
    if _services(library, facts, refused):
        return None
    reason = f"this installation's kernels ({library.held()}) do not run on compute capability {_dotted(facts)}"
    obstacles = [library.obstacles(facts, refused), *_reasons.get(index, [])]
    return "; ".join([reason, *filter(None, obstacles)])


def service(device: torch.device, own: str, tuned: str | None) -> Service | None:
    """What serves the launches on a CUDA device whose own tile table is ``own``; None where Triton compiles them.

    That is code of the device's own table where there is some, else of the newest older table whose kernels all run
    there. ``tuned``: the table that RPSFT_TILES changes, if any, whose kernels are then not the installed ones.
    """
    library = _usable()
    if isinstance(library, str) or tuned == own:
        return None
    index = _index(device)
    return _service(library, _facts(index), _refused.get(index, _NOTHING), own, tuned)


def table_for(device: torch.device, own: str, tuned: str | None = None) -> str:
    """The tile table that launches on a CUDA device are planned with."""
    found = service(device, own, tuned)
    return own if found is None else found.table


@lru_cache(maxsize=256)
def _services(library: Library, facts: Device, refused: Refused) -> list[Service]:
    return library.services(facts, refused)


@lru_cache(maxsize=256)
def _service(library: Library, facts: Device, refused: Refused, own: str, tuned: str | None) -> Service | None:
    newest = int(own[3:])
    found = [s for s in _services(library, facts, refused) if s.generation <= newest and s.table != tuned]
    # The first of equals is the one that runs best.
    return max(found, key=lambda each: each.generation, default=None)


@lru_cache(maxsize=4096)
def _chosen(library: Library, variant: Variant, facts: Device, refused: Refused) -> Choice | str:
    return library.find(variant, facts, refused)


def serves(variant: Variant, device: torch.device) -> bool:
    """Whether a kernel serves a variant's launches on a GPU; if not, Triton is to compile it.

    Raises:
        NoKernel: nothing may or can compile it.
    """
    index, library = _index(device), _usable()
    if isinstance(library, str):
        return _left(index, "none", variant, library)
    choice = _chosen(library, variant, _facts(index), _refused.get(index, _NOTHING))
    return not isinstance(choice, str) or _left(index, "no match", variant, choice)


def complete(found: Service, ranks: Sequence[int]) -> bool:
    """Whether what serves a device has a kernel for every launch there; ``ranks``: one of each class."""
    library = _usable()
    return (
        not isinstance(library, str)
        and library.manifest.get("only") == ""
        and library.manifest.get("ranks") == list(ranks)
        and not any(each["arch"] == found.arch for each in library.manifest["left_out"])
    )


def start(variant: Variant, programs: int, device: torch.device, arguments: Sequence[Tensor]) -> bool:
    """Run ``programs`` > 0 programs of a variant on the current stream of a GPU, where a kernel serves the call.

    Returns:
        Whether it was started; if not, Triton is to compile it.

    Raises:
        NoKernel: no kernel serves the call, and nothing may or can compile it.
        RuntimeError: the driver could not start it.
    """
    index = _index(device)
    library = _usable()
    if isinstance(library, str):
        return _left(index, "none", variant, library)
    facts = _facts(index)
    while True:
        choice = _chosen(library, variant, facts, _refused.get(index, _NOTHING))
        if isinstance(choice, str):
            said = [f"compute capability {_dotted(facts)}: {choice}", *_reasons.get(index, [])]
            return _left(index, "no match", variant, "; ".join(said))
        values = []
        for argument, tensor in zip(choice.entry["arguments"], arguments, strict=True):
            value = tensor.data_ptr()
            if value % argument["divisibility"]:
                why = f"its argument {argument['name']} is not aligned to {argument['divisibility']} bytes"
                return _left(index, "misaligned", variant, why)
            values.append(value)
        try:
            _launch(library, choice, variant, programs, index, values)
        except binding().LoadError as error:
            _refuse(index, choice, facts, str(error))
            continue
        except RuntimeError as error:
            raise RuntimeError(
                f"{error} (compiled ahead of time, {_how(choice, facts)}; RPSFT_AOT=0 leaves kernels to Triton)"
            ) from error
        _say(index, choice.how, f"cuda:{index}: kernels compiled ahead of time, {_how(choice, facts)}")
        return True


def _launch(
    library: Library, choice: Choice, variant: Variant, programs: int, index: int, values: Sequence[int]
) -> None:
    device = torch.device("cuda", index)
    # Held until the kernel is queued; then the allocator gives the memory to what comes later in the stream.
    scratch, size, alignment = None, choice.entry["scratch"]["size"], choice.entry["scratch"]["alignment"]
    if size:
        scratch = _scratch(size * programs + alignment, device)
    # Triton's two parameters behind the declared ones: scratch memory, and that of its profiler.
    extra = [0 if scratch is None else -(-scratch.data_ptr() // alignment) * alignment, 0]
    stream = torch.cuda.current_stream(device).cuda_stream
    kernel(library, choice, variant.label()).launch(index, stream, (programs, 1, 1), [*values, *extra])


def _scratch(size: int, device: torch.device) -> Tensor:
    # Where programs put their descriptors. Machine code writes one by atomic exchanges and throws away what they give
    # back: a sanitizer may call that a read of memory that was never written, but no value of it is ever used.
    return torch.empty(size, dtype=torch.int8, device=device)


def _refuse(index: int, choice: Choice, facts: Device, error: str) -> None:
    """Pass over all images of this kind on a device from now on: what a driver says of one it says of the others."""
    arch, kind = choice.entry["arch"], "PTX" if choice.how == "ptx" else "machine code"
    with _lock:
        refused = _refused.get(index, _NOTHING)
        if (arch, choice.how) in refused:
            return
        _refused[index] = refused | {(arch, choice.how)}
        _reasons[index] = [*_reasons.get(index, []), f"the driver refused {arch} {kind}: {error}"]
    _log.warning(
        f"cuda:{index}: {arch} {kind} compiled ahead of time is passed over on compute capability {_dotted(facts)}: "
        f"{error}"
    )


def _left(index: int, kind: str, variant: Variant, reason: str) -> bool:
    """Leave a launch to Triton, or say why it cannot be."""
    if mode() == "only":
        way_out = "RPSFT_AOT=1 lets Triton compile it"
    elif toolchain.jit_missing():
        way_out = f"it cannot be compiled: {toolchain.jit_missing()}"
    else:
        _say(index, f"jit, {kind}", f"cuda:{index}: Triton compiles {variant.label()}: {reason}")
        return False
    raise NoKernel(f"no kernel compiled ahead of time for {variant.label()} on cuda:{index}: {reason}; {way_out}")


def _how(choice: Choice, facts: Device) -> str:
    arch, capability = choice.entry["arch"], _dotted(facts)
    tiles = f"with the tiles of {choice.entry['table']}"
    return {
        "exact": f"{arch} machine code on compute capability {capability}",
        "compatible": f"{arch} machine code, which compute capability {capability} runs too, {tiles}",
        "ptx": f"{arch} PTX, which the driver translates for compute capability {capability}, {tiles}",
    }[choice.how]


def _dotted(facts: Device) -> str:
    return f"{facts.capability // 10}.{facts.capability % 10}"


def _say(index: int, kind: str, message: str) -> None:
    if (index, kind) in _said:
        return
    with _lock:
        if (index, kind) in _said:
            return
        _said.add((index, kind))
    _log.info(message)
