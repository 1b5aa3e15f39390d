"""setuptools' hooks, with the requirements that kernels have. Only wheels carry kernels.

A source distribution holds no kernels, and an editable install has its folder of kernels in the source tree, which
``python -m rpsft_kernels kernels --build native`` fills. So neither needs a compiler of kernels, and neither names
kernels in its keywords.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bare_package import load
from setuptools import build_meta
from setuptools.build_meta import build_wheel, prepare_metadata_for_build_wheel

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]
Settings = Mapping[str, Any] | None

_aot_wanted = load("ops.triton.aot.wanted")

# The oldest Triton whose code keeps the rules of Hopper's tensor cores: see rpsft_kernels/ops/triton/toolchain.py.
_COMPILE = "triton>=3.9"


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    wanted = _aot_wanted.wanted_targets(os.environ)
    compiles = bool(wanted.targets) and not os.environ.get("RPSFT_AOT_PREBUILT", "").strip()
    # A requirement that no registry can serve would break an installation that can do without it.
    requirements = [_COMPILE] if compiles and (wanted.required or _has_triton()) else []
    return build_meta.get_requires_for_build_wheel(config_settings) + requirements


def _has_triton() -> bool:
    """Whether Triton has a wheel for this Python and system; its wheels need Linux with glibc 2.27 or newer."""
    library, number = platform.libc_ver()
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    return (
        sys.implementation.name == "cpython"
        and sys.version_info >= ((3, 14) if free_threaded else (3, 11))
        and platform.machine() in ("x86_64", "aarch64")
        and library == "glibc"
        and [int(field) for field in number.split(".")[:2]] >= [2, 27]
    )


def get_requires_for_build_sdist(config_settings: Settings = None) -> list[str]:
    with _no_kernels():
        return build_meta.get_requires_for_build_sdist(config_settings)


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    with _no_kernels():
        return build_meta.get_requires_for_build_editable(config_settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings = None) -> str:
    with _no_kernels():
        return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_sdist(sdist_directory: str, config_settings: Settings = None) -> str:
    with _no_kernels():
        return build_meta.build_sdist(sdist_directory, config_settings)


def build_editable(
    wheel_directory: str, config_settings: Settings = None, metadata_directory: str | None = None
) -> str:
    with _no_kernels():
        return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


@contextmanager
def _no_kernels() -> Iterator[None]:
    name = _aot_wanted.VARIABLE
    before = os.environ.get(name)
    os.environ[name] = "none"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
