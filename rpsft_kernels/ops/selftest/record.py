"""Which kernels have passed the quick self-test on which device: one small file each in the user's cache folder.

What a file says must be what is the case now: device, driver, kernels and package. Anything else, a file that cannot be
read included, is no record.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from ...version import __version__
from ..triton import toolchain
from ..triton.aot import dispatch as aot
from ..triton.aot import loader
from ..triton.aot.jobs import changes_code
from ..triton.aot.library import MANIFEST

_TRITON = Path(__file__).parents[1] / "triton"
# Where Linux says which driver is loaded; CUDA's own number changes less often than the driver.
_DRIVER = Path("/sys/module/nvidia/version")
_log = logging.getLogger("rpsft_kernels")


def folder() -> Path:
    """``rpsft_kernels`` in XDG_CACHE_HOME, else in ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "rpsft_kernels"


def facts(device: torch.device) -> dict[str, str]:
    """What a pass depends on, of a GPU and what this installation would run there."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "package": __version__,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        # Older versions of torch do not tell.
        "uuid": str(getattr(properties, "uuid", "unknown")),
        "driver": _driver_version(),
        "kernels": kernels_digest(),
    }


def _driver_version() -> str:
    launcher = loader.launcher()
    try:
        cuda = "unknown" if launcher is None else str(launcher.driver_version())
    except (AttributeError, RuntimeError):
        cuda = "unknown"
    try:
        driver = _DRIVER.read_text(encoding="utf-8").strip()
    except OSError:
        driver = "unknown"
    return f"{driver}, CUDA {cuda}, HIP {torch.version.hip}"


def kernels_digest() -> str:
    """Of all that decides which code runs: kernels compiled ahead of time, sources, compiler and tile tables."""
    digest = hashlib.sha256()
    for piece in _kernels():
        digest.update(len(piece).to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _kernels() -> Iterator[bytes]:
    mode = aot.mode()
    yield mode.encode()
    library = aot.installed_library()
    if mode != "0" and library is not None:
        yield (library.folder / MANIFEST).read_bytes()
        # Without what launches them they are not what runs.
        yield str(loader.launcher() is None).encode()
    if mode != "only":
        # What could not be compiled was not tested.
        yield f"{_version('triton')} {bool(toolchain.jit_missing())}".encode()
        for name in filter(_compiles_otherwise, sorted(os.environ)):
            yield f"{name}={os.environ[name]}".encode()
    for source in sorted(_TRITON.rglob("*")):
        if source.suffix in (".py", ".json"):
            yield source.relative_to(_TRITON).as_posix().encode()
            yield source.read_bytes()
    tiles = os.environ.get("RPSFT_TILES", "")
    yield Path(tiles).read_bytes() if tiles else b""


def _compiles_otherwise(name: str) -> bool:
    """Whether an environment variable may change what Triton makes of a kernel: an assembler of the user's own too."""
    return name.startswith("TRITON_PTXAS") or (changes_code(name) and not name.startswith("TRITON_CACHE_"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def path(known: dict[str, str]) -> Path:
    """The file of these facts."""
    return folder() / f"selftest-{hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:20]}.json"


def when_passed(known: dict[str, str]) -> str | None:
    """When kernels passed of which all this is true; None where there is no record."""
    try:
        read = json.loads(path(known).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(read, dict) or read.get("facts") != known or not isinstance(read.get("passed"), str):
        return None
    return str(read["passed"])


def store(known: dict[str, str]) -> None:
    """Write down that they have passed. Where that cannot be written, the next process tests again."""
    target = path(known)
    text = json.dumps({"passed": datetime.now(timezone.utc).isoformat(timespec="seconds"), "facts": known}, indent=1)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write at once, and others read meanwhile: a whole file takes the place of another.
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.stem}-")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text + "\n")
            os.replace(name, target)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        _log.info(f"self-test passed, but {target} cannot be written ({error}); it will run again in the next process")
