"""What a bug report needs: versions, backends, kernels found, and what they are to each device."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import torch

from . import __version__, aot
from .ops import available_backends, native

_PACKAGES = ("triton", "numpy", "safetensors", "transformers", "deepspeed")
_VARIABLES = (
    "RPSFT_AOT",
    "RPSFT_BACKEND",
    "RPSFT_CUDA_DRIVER",
    "RPSFT_ISA",
    "RPSFT_TILES",
    "TRITON_INTERPRET",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)


def environment_report() -> str:
    """Lines of ``name: value``, nothing of which is secret."""
    return "\n".join(f"{name:<24}{value}" for name, value in _facts())


def _facts() -> Iterator[tuple[str, str]]:
    yield "rpsft_kernels", __version__
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform()
    yield "torch", f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"
    for package in _PACKAGES:
        yield package, _version(package)
    for variable in _VARIABLES:
        if variable in os.environ:
            yield variable, os.environ[variable]
    yield "threads", str(torch.get_num_threads())
    yield "instruction sets", ", ".join(native.instruction_sets()) or "none: the CPU engine is not built"
    library = aot.installed()
    yield "kernels", library if isinstance(library, str) else library.summary().replace("\n", "\n" + " " * 24)
    yield from _backends(torch.device("cpu"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _device(torch.device("cuda", index))
    else:
        yield "GPU", "none that torch sees"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _device(device: torch.device) -> Iterator[tuple[str, str]]:
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    yield str(device), f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    if torch.version.hip is None:
        yield f"{device} kernels", aot.unavailable(device) or "compiled ahead of time, for this device"
    yield from _backends(device)


def _backends(device: torch.device) -> Iterator[tuple[str, str]]:
    for name, reason in available_backends(device, torch.bfloat16).items():
        yield f"{device} {name}", reason or "available"
