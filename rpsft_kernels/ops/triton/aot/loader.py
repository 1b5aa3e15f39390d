"""Loads kernels compiled ahead of time, from a library's file into the native launcher, once per process."""

from __future__ import annotations

import hashlib
import importlib
import threading
from functools import lru_cache
from typing import Any

from .library import KernelMatch, Library
from .targets import Compatibility

_lock = threading.Lock()
_kernels: dict[tuple[Library, str, Compatibility], Any] = {}


def launcher() -> Any:
    """The launcher of the native module, or None: see :func:`launcher_missing`."""
    return _import_launcher()[0]


def launcher_missing() -> str | None:
    """Why there is no launcher."""
    return _import_launcher()[1]


@lru_cache(maxsize=1)
def _import_launcher() -> tuple[Any | None, str | None]:
    try:
        native = importlib.import_module("rpsft_kernels._native")
    except ImportError as error:
        return None, f"this installation carries no native module to launch them ({error})"
    cuda = getattr(native, "cuda", None)
    if cuda is None:
        return None, "this installation's native module has no CUDA launcher"
    if not hasattr(cuda, "LoadError"):
        return None, "this installation's native module is older than the package; install it again"
    return cuda, None


def kernel(library: Library, match: KernelMatch, label: str) -> Any:
    """The native launcher of one kernel, which loads the code on a device at the first launch there.

    Raises:
        RuntimeError: the kernel's file is missing, or is not the one that the manifest describes, or there is no native
            launcher.
    """
    key = (library, match.entry["id"], match.compatibility)
    loaded = _kernels.get(key)
    if loaded is not None:
        return loaded
    # The lock is held while the file is read: other threads wait, so that a device never loads the kernel twice.
    with _lock:
        if key not in _kernels:
            _kernels[key] = _load(library, match, label)
        return _kernels[key]


def _load(library: Library, match: KernelMatch, label: str) -> Any:
    native = launcher()
    if native is None:
        raise RuntimeError(launcher_missing())
    path = library.folder / match.file["file"]
    try:
        image = path.read_bytes()
    except OSError as error:
        raise RuntimeError(f"{path}: the manifest lists it, but it cannot be read ({error.strerror})") from error
    if hashlib.sha256(image).hexdigest() != match.file["sha256"]:
        raise RuntimeError(f"{path} is not the file that its manifest describes")
    entry = match.entry
    layout = [(offset, size) for offset, size in entry["layout"]]
    return native.Kernel(image, entry["entry"], label, entry["threads"], entry["shared"], layout)
