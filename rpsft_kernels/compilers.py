"""Whether Triton can compile and start kernels here, found without importing it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path


def jit_missing() -> str:
    """Why Triton cannot compile and start a kernel on a GPU of this machine; "" where it can."""
    return triton_missing() or compiler_missing()


@lru_cache(maxsize=1)
def triton_missing() -> str:
    """Why the package triton cannot compile the kernels; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Some builds of torch carry one under another name: of the right age, one may suppose.
        return ""
    numbers = [int(part) for part in re.findall(r"\d+", version)[:2]]
    if numbers < [3, 6]:
        return f"the package triton {version} is too old (pip install 'triton>=3.6', or a torch that brings it)"
    return ""


@lru_cache(maxsize=1)
def compiler_missing() -> str:
    """Why the helper through which Triton starts kernels on a GPU cannot be built; "" where it can, or was before.

    Triton compiles it with the C compiler that CC names, else gcc or clang, at its first launch on a machine.
    """
    named = os.environ.get("CC")
    if any(shutil.which(name) for name in ([named] if named is not None else ["gcc", "clang"])) or _helper_is_built():
        return ""
    found = f"CC names {named!r}, which is not found" if named is not None else "neither gcc nor clang is found"
    return f"Triton needs a C compiler at its first launch, and {found} (install gcc, or set CC)"


def _helper_is_built() -> bool:
    folder = os.environ.get("TRITON_CACHE_DIR") or os.path.join(
        os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache"
    )
    try:
        return any(Path(folder).glob("*/*_utils*.so"))
    except OSError:
        return False
