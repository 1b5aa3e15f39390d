"""setuptools' hooks, and what they take from TORCH_CUDA_ARCH_LIST: it is for wheels alone.

A source distribution holds no kernels, and an editable install has its folder of them in the source tree, which
``python -m rpsft_kernels kernels --build`` fills. So neither needs a compiler of kernels, nor says in its version what
is not inside.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

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

# What importing the package takes, and compiling its kernels.
_IMPORT = ["torch>=2.6", "numpy>=1.23.5", "safetensors>=0.4.3", "tqdm"]
_COMPILE = ["triton>=3.6"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    needed = build_meta.get_requires_for_build_wheel(config_settings)
    if wanted:
        needed += _IMPORT + ([] if os.environ.get("RPSFT_AOT_PREBUILT", "").strip() else _COMPILE)
    return needed


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
    wanted = os.environ.pop("TORCH_CUDA_ARCH_LIST", None)
    try:
        yield
    finally:
        if wanted is not None:
            os.environ["TORCH_CUDA_ARCH_LIST"] = wanted
