"""Records of kernels that have passed the quick self-test on a device: small files in the user's cache folder.

A record counts only where its facts are those of now: device, driver, kernels and package. Any other file, one that
cannot be read included, is no record.
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
# Linux names the loaded driver here; CUDA's own version changes less often than the driver.
_DRIVER = Path("/sys/module/nvidia/version")
_log = logging.getLogger("rpsft_kernels")


def folder() -> Path:
    """Return ``rpsft_kernels`` in XDG_CACHE_HOME, else in ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "rpsft_kernels"


def collect_facts(device: torch.device) -> dict[str, str]:
    """Collect the facts that a pass depends on, of a GPU and of the code that this installation would run there."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "package": __version__,
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        # Older versions of torch have no uuid.
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
    """Hash all that decides which code runs: kernels compiled ahead of time, sources, compiler and tile tables."""
    digest = hashlib.sha256()
    for content in _read_kernels():
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def _read_kernels() -> Iterator[bytes]:
    mode = aot.mode()
    yield mode.encode()
    library = aot.installed_library()
    if mode != "0" and library is not None:
        yield (library.folder / MANIFEST).read_bytes()
        # Without a launcher these kernels do not run.
        yield str(loader.launcher() is None).encode()
    if mode != "only":
        # Where Triton could not compile, its kernels were not tested.
        yield f"{_version('triton')} {bool(toolchain.jit_missing())}".encode()
        for name in filter(_changes_compilation, sorted(os.environ)):
            yield f"{name}={os.environ[name]}".encode()
    for source in sorted(_TRITON.rglob("*")):
        if source.suffix in (".py", ".json"):
            yield source.relative_to(_TRITON).as_posix().encode()
            yield source.read_bytes()
    tiles = os.environ.get("RPSFT_TILES", "")
    yield Path(tiles).read_bytes() if tiles else b""


def _changes_compilation(name: str) -> bool:
    """Return whether an environment variable may change the code that Triton compiles, or choose its assembler."""
    return name.startswith("TRITON_PTXAS") or (changes_code(name) and not name.startswith("TRITON_CACHE_"))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def path_of(facts: dict[str, str]) -> Path:
    """Return the file of a record of these facts."""
    return folder() / f"selftest-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:20]}.json"


def when_passed(facts: dict[str, str]) -> str | None:
    """Return the time when kernels passed with these facts; None where there is no record."""
    try:
        record = json.loads(path_of(facts).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(record, dict) or record.get("facts") != facts or not isinstance(record.get("passed"), str):
        return None
    return str(record["passed"])


def store(facts: dict[str, str]) -> None:
    """Record that kernels have passed with these facts. Where that cannot be written, the next process tests again."""
    target = path_of(facts)
    text = json.dumps({"passed": datetime.now(timezone.utc).isoformat(timespec="seconds"), "facts": facts}, indent=1)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write at once while others read, so that a whole file replaces another.
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
