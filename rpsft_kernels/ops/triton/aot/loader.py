"""Kernels compiled ahead of time, loaded: from a library's file to the native launcher, once in a process."""

from __future__ import annotations

import hashlib
import importlib
import threading
from functools import lru_cache
from typing import Any

from .library import Choice, Library

_lock = threading.Lock()
_kernels: dict[tuple[Library, str, str], Any] = {}


@lru_cache(maxsize=1)
def binding() -> Any:
    """The native module's launcher, or why there is none (a str)."""
    try:
        native = importlib.import_module("rpsft_kernels._native")
    except ImportError as error:
        return f"this installation carries no native module to launch them ({error})"
    launcher = getattr(native, "cuda", None)
    if launcher is None:
        return "this installation's native module has no CUDA launcher"
    if not hasattr(launcher, "LoadError"):
        return "this installation's native module is older than the package; install it again"
    return launcher


def kernel(library: Library, choice: Choice, label: str) -> Any:
    """The native launcher of one kernel; it loads the code on each device where it is first launched.

    Raises:
        RuntimeError: its file is missing or is another one than the manifest describes.
    """
    key = (library, choice.entry["id"], choice.how)
    found = _kernels.get(key)
    if found is not None:
        return found
    # Held while the file is read: who else wants it meanwhile waits, so that a device never has it twice.
    with _lock:
        if key not in _kernels:
            _kernels[key] = _made(library, choice, label)
        return _kernels[key]


def _made(library: Library, choice: Choice, label: str) -> Any:
    path = library.folder / choice.file["file"]
    try:
        image = path.read_bytes()
    except OSError as error:
        raise RuntimeError(f"{path}: the manifest lists it, but it cannot be read ({error.strerror})") from error
    if hashlib.sha256(image).hexdigest() != choice.file["sha256"]:
        raise RuntimeError(f"{path} is not the file that its manifest describes")
    entry = choice.entry
    layout = [(offset, size) for offset, size in entry["layout"]]
    return binding().Kernel(image, entry["entry"], label, entry["threads"], entry["shared"], layout)
