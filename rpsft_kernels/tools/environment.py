"""Collects the facts that a bug report needs: versions, backends, kernels, and how each device uses them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterator
from functools import partial

import torch

from ..ops import native
from ..ops.dispatch import NAMES, load
from ..ops.triton import toolchain
from ..ops.triton.aot import dispatch as aot
from ..ops.triton.aot import loader
from ..ops.triton.aot.targets import Compatibility
from ..ops.triton.machine_code.cubin import disassembler
from ..version import __version__

_PACKAGES = ("triton", "numpy", "safetensors", "transformers", "deepspeed")
# Variables to report besides this package's own.
_VARIABLES = ("TRITON_INTERPRET", "TRITON_CACHE_DIR", "CC", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
_COLUMN = 24
_Fact = tuple[str, Callable[[], str]]


def environment_report() -> str:
    """Write lines of a name and a value, none of them secret. The reason replaces a value that cannot be found out."""
    lines = []
    for name, probe in _facts():
        value = _run_probe(probe).replace("\n", "\n" + " " * _COLUMN)
        # A name that fills its column would run into its value.
        lines.append(f"{name:<{_COLUMN - 1}} {value}")
    return "\n".join(lines)


def _run_probe(probe: Callable[[], str]) -> str:
    # One failing probe must not hide the others.
    try:
        return probe()
    except Exception as error:
        return f"cannot be told: {type(error).__name__}: {error}"


def _facts() -> Iterator[_Fact]:
    yield "rpsft_kernels", lambda: __version__
    # pip's version: a source tree has none, and it differs from the above if a source tree hides an installation.
    yield "distribution", lambda: _version("rpsft_kernels")
    yield "python", lambda: f"{platform.python_version()} ({platform.python_implementation()})"
    yield "platform", platform.platform
    yield "torch", lambda: f"{torch.__version__} (CUDA {torch.version.cuda}, HIP {torch.version.hip})"
    for package in _PACKAGES:
        yield package, partial(_version, package)
    for variable in sorted(name for name in os.environ if name.startswith("RPSFT_") or name in _VARIABLES):
        yield variable, partial(os.environ.__getitem__, variable)
    yield "threads", lambda: str(torch.get_num_threads())
    yield "instruction sets", lambda: ", ".join(native.instruction_sets()) or str(native.missing())
    for name, reason in native.missing_instruction_sets().items():
        yield f"no {name}", partial(str, reason)
    yield "kernels", _kernels
    yield "JIT on a GPU", lambda: toolchain.jit_missing() or "Triton can compile and start kernels"
    yield "JIT on 9.x", _describe_products
    yield "CUDA driver", _describe_driver
    yield from _backends(torch.device("cpu"))
    yield "GPUs", _gpus
    for index in range(_count_gpus()):
        yield from _device(torch.device("cuda", index))


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels() -> str:
    library = aot.installed_library()
    return str(aot.kernels_missing()) if library is None else library.summary()


def _describe_products() -> str:
    """Say how this installation treats code that Triton compiles for compute capability 9.x."""
    if missing := toolchain.jit_missing():
        return missing
    if toolchain.touches_products():
        which = "the plain forms of project and, with float32 bases, drift and gradient"
        return f"Triton {toolchain.triton_version()} compiles kernels wrongly ({which}): those are not launched"
    try:
        disassembler()
    except ValueError as error:
        unsafe = toolchain.products_unsafe()
        return f"{unsafe or 'nothing speaks against this Triton'}; code cannot be looked at: {error}"
    return "code is looked at before its first launch"


def _describe_driver() -> str:
    launcher = loader.launcher()
    if launcher is None:
        return str(loader.launcher_missing())
    version = launcher.driver_version()
    return f"CUDA {version // 1000}.{version % 1000 // 10}"


def _gpus() -> str:
    return f"{torch.cuda.device_count()} that torch sees" if torch.cuda.is_available() else "none that torch sees"


def _count_gpus() -> int:
    try:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    except Exception:  # the line "GPUs" reports the error
        return 0


def _device(device: torch.device) -> Iterator[_Fact]:
    yield str(device), lambda: _describe_gpu(device)
    yield f"{device} kernels", lambda: _describe_kernels(device)
    yield f"{device} self-test", lambda: _describe_selftest(device)
    yield from _backends(device)


def _describe_gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"


def _describe_kernels(device: torch.device) -> str:
    from ..ops.triton.device import own_profile
    from ..ops.triton.tile_table import tuned_architecture

    own, tuned = own_profile(device).architecture, tuned_architecture()
    served = None if torch.version.hip is not None else aot.served_table(device, own, tuned)
    if served is not None:
        ptx = served.compatibility is Compatibility.PTX
        kind = "PTX, which the driver translates" if ptx else f"machine code ({served.compatibility.value})"
        return f"{served.arch} {kind}, table {served.table}, {served.kernels} kernels"
    why = aot.unavailable(device) or f"RPSFT_TILES changes the table {own}, which kernels were compiled of"
    if aot.can_compile():
        return f"JIT, table {own}: {why}"
    return f"none: {why}; {toolchain.jit_missing() or 'RPSFT_AOT=only'}"


def _describe_selftest(device: torch.device) -> str:
    from ..ops.selftest import gate

    return gate.state(device)


def _backends(device: torch.device) -> Iterator[_Fact]:
    for name in NAMES:
        yield f"{device} {name}", partial(_backend, name, device)


def _backend(name: str, device: torch.device) -> str:
    return load(name).unavailable(device, torch.bfloat16) or "available"
