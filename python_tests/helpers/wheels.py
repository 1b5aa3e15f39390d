"""Wheels built in tests, as a user builds them, from a copy of what git would track."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
_FILES = (
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "pyproject.toml",
    "requirements-dev.txt",
    "setup.py",
)
_FOLDERS = ("rpsft_kernels", "csrc", "build_tools")
# Variables that decide how a package is built: a test sets them, or they are not set.
_VARIABLES = (
    "CXX",
    "MAX_JOBS",
    "PYTHONPATH",
    "RPSFT_AOT_KERNELS",
    "RPSFT_AOT_PREBUILT",
    "RPSFT_CUDA_ARCHS",
    "RPSFT_CUDA_DRIVER",
    "RPSFT_NATIVE",
    "RPSFT_STRICT",
    "SOURCE_DATE_EPOCH",
    "TORCH_CUDA_ARCH_LIST",
    "TRITON_INTERPRET",
)


def copy_sources(folder: Path, *, objects: bool = False) -> Path:
    """The sources in a new folder. ``objects``: with what the installation under test was linked from, where it was
    built here, so that only what differs from it is compiled again.
    """
    folder.mkdir(parents=True)
    for name in _FILES:
        shutil.copy(REPOSITORY / name, folder / name)
    # A build or a run has left these in the tree; of folders "kernels", only the package's own one.
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_native_build.txt")
    for name in _FOLDERS:
        shutil.copytree(REPOSITORY / name, folder / name, ignore=ignored)
    shutil.rmtree(folder / "rpsft_kernels" / "kernels", ignore_errors=True)
    if objects:
        for built in (REPOSITORY / "build").glob("native-*"):
            shutil.copytree(built, folder / "build" / built.name)
    return folder


def run_python(*arguments: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Python in a folder, with those variables alone of the ones that decide a build; its output is in ``stdout``.

    It finds no GPU, whatever the machine has, unless RPSFT_CUDA_DRIVER is among them.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
    environment |= {"RPSFT_CUDA_DRIVER": str(cwd / "no-driver.so")} | variables
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500
    )


def without(folder: Path, *packages: str) -> str:
    """A new folder for PYTHONPATH, under which these packages cannot be imported, as if they were not installed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in packages:
        (folder / f"{name}.py").write_text(f"raise ModuleNotFoundError('{name} is absent', name='{name}')\n")
    return str(folder)


def build_wheel(source: Path, wheels: Path, **variables: str) -> tuple[Path, str]:
    """A wheel of a folder of sources or of a source distribution, and what its build printed."""
    options = ("-v", "--no-deps", "--no-build-isolation", "-w", wheels)
    run = run_python("-m", "pip", "wheel", *options, source, cwd=source.parent, **variables)
    assert run.returncode == 0, run.stdout[-3000:]
    (wheel,) = wheels.glob("*.whl")
    return wheel, run.stdout


def version() -> str:
    """Read pyproject.toml."""
    found = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    assert found is not None
    return found[1]


@dataclass(frozen=True)
class FullWheel:
    """A wheel, a folder that it is unpacked into, and what its build printed."""

    path: Path
    folder: Path
    printed: str

    @property
    def version(self) -> str:
        return version()

    @property
    def kernels(self) -> Path:
        return self.folder / "rpsft_kernels" / "kernels"

    def manifest(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads((self.kernels / "manifest.json").read_text())
        return loaded


def build_full_wheel(folder: Path) -> FullWheel:
    """Build a wheel with every kernel for sm_90 and the native module, which takes minutes."""
    source = copy_sources(folder / "source", objects=True)
    wheel, printed = build_wheel(source, folder / "wheels", RPSFT_CUDA_ARCHS="9.0", RPSFT_STRICT="1", MAX_JOBS="2")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return FullWheel(wheel, folder / "unpacked", printed)
