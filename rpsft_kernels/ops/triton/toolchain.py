"""Finds out whether Triton can compile and start kernels here, without importing it.

Functions that report what is missing or wrong return ``str | None``; None means that nothing is.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from functools import lru_cache
from pathlib import Path


def jit_missing() -> str | None:
    """Why Triton cannot compile and start a kernel on a GPU of this machine."""
    return triton_missing() or compiler_missing()


@lru_cache(maxsize=1)
def triton_missing() -> str | None:
    """Why the package triton cannot compile the kernels."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    version = triton_version()
    # Some builds of torch bring Triton under another name, without a version; it is assumed to be new enough.
    if version and _numbers(version) < (3, 6):
        return f"the package triton {version} is too old (pip install 'triton>=3.6', or a torch that brings it)"
    return None


# Below this version Triton's code for compute capability 9.0 touches registers of pending products (see
# register_hazards) in plain kernels that compute an operand in registers: project with bfloat16 U and V, gradient with
# float32 U and V where W is read by columns and, below 3.8, drift with float32 U and V. They were all scanned as 3.6.0,
# 3.7.0, 3.8.0 and 3.9.0 compile them, each with the assembler that it brings (12.8.93, 12.8.93, 12.9.86, 13.4): the
# first three break the rule, 3.9.0 breaks it in no kernel. The warp-specialised kernels keep it under 3.6.0 and 3.9.0.
PRODUCTS_KEPT = (3, 9)
# Environment variables that choose the assembler or change its output.
_ASSEMBLER = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "PTXAS_OPTIONS", "DISABLE_PTXAS_OPT")


def touches_products() -> bool:
    """Whether the installed Triton is known to touch registers of pending products."""
    version = triton_version()
    return bool(version) and _numbers(version) < PRODUCTS_KEPT


def products_unsafe() -> str | None:
    """Why code for compute capability 9.0 that Triton compiles here, with an operand in registers, may be wrong.

    This decides only where there is no disassembler to scan the code itself.
    """
    version = triton_version()
    if not version:
        return "the version of Triton is not known"
    if touches_products():
        return f"Triton {version} is known to compile such kernels wrongly"
    changed = [name for name in _ASSEMBLER if os.environ.get(name)]
    return f"{' and '.join(changed)} may change how Triton assembles it" if changed else None


def triton_version() -> str:
    """The version of the package triton; "" if it has none."""
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


@lru_cache(maxsize=1)
def compiler_missing() -> str | None:
    """Why the helper through which Triton starts kernels on a GPU cannot be built, unless it was built before.

    Triton compiles it with the C compiler that CC names, else gcc or clang, at its first launch on a machine.
    """
    named = os.environ.get("CC")
    if any(shutil.which(name) for name in ([named] if named is not None else ["gcc", "clang"])) or _helper_is_built():
        return None
    reason = f"CC names {named!r}, which is not found" if named is not None else "neither gcc nor clang is found"
    return f"Triton needs a C compiler at its first launch, and {reason} (install gcc, or set CC)"


def _helper_is_built() -> bool:
    folder = os.environ.get("TRITON_CACHE_DIR") or os.path.join(
        os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache"
    )
    try:
        return any(Path(folder).glob("*/*_utils*.so"))
    except OSError:
        return False
