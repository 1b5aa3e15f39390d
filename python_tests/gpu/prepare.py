"""Builds what a run on a GPU needs inside the working tree: the native module, and the kernels of its sources.

    python python_tests/gpu/prepare.py native | kernels

Neither needs a network where this Python has what they take. Kernels that are there and current are taken as they are.
Where they are not, the Triton at hand compiles them, if its code is known to be right on this GPU; else a newer one
does, in an environment of its own (.venv-kernels), which takes a package registry.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-kernels"
COMPILE = ROOT / "build_tools" / "compile_kernels.py"


def native() -> str:
    """Build rpsft_kernels/_native in place; what is wrong, or ""."""
    missing = [name for name in ("setuptools", "pybind11", "ninja") if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        return f"the native module's build needs {names}: {sys.executable} -m pip install {names}"
    # The kernels are another part's affair.
    variables = {**os.environ, "RPSFT_NATIVE": "1", "RPSFT_CUDA_ARCHS": "none"}
    if run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], variables):
        return "the native module was not built: see above"
    if run([sys.executable, "-c", "import rpsft_kernels._native"], variables):
        return "the native module does not load: see above"
    return ""


def kernels() -> str:
    """See that rpsft_kernels/kernels serves the GPU at hand; what is wrong, or ""."""
    import torch

    from rpsft_kernels.ops.triton.aot.library import FOLDER

    major, minor = torch.cuda.get_device_capability()
    reason = stale(FOLDER, 10 * major + minor)
    if not reason:
        return ""
    print(f"compiling kernels for {major}.{minor}: {reason}", flush=True)
    python, why = compiler(10 * major + minor)
    if not python:
        return (
            f"no kernels can be compiled: {why}; carry rpsft_kernels/kernels here from a machine with a newer Triton: "
            f'python -m rpsft_kernels kernels --build "{major}.{minor}"'
        )
    variables = without(os.environ, "PYTHONPATH", "RPSFT_AOT_KERNELS")
    command = [python, str(COMPILE), "--arch", f"{major}.{minor}", "--output", str(FOLDER)]
    if run(command, variables):
        return "the kernels were not compiled: see above"
    return stale(FOLDER, 10 * major + minor)


def stale(folder: Path, capability: int) -> str:
    """Why a folder's kernels are not all that this GPU and these sources ask for; "" if they are."""
    from rpsft_kernels.ops.triton.aot.library import Library

    try:
        library = Library.open(folder)
    except ValueError as error:
        return str(error)
    own = [row.arch for row in library.generations if row.capability == capability]
    if not own:
        return f"the kernels in {folder} are for {library.arch_names()}"
    if library.manifest["only"]:
        return f"the kernels in {folder} are a selection: {library.manifest['only']}"
    left_out = [each for each in library.manifest["left_out"] if each["arch"] in own]
    if left_out:
        return f"the kernels in {folder} lack {len(left_out)}, such as {left_out[0]['label']}: {left_out[0]['reason']}"
    print(library.summary(), flush=True)
    return ""


def compiler(capability: int) -> tuple[str, str]:
    """A Python whose Triton compiles right code for a GPU, or "" and why there is none."""
    from rpsft_kernels.ops.triton import toolchain

    why = toolchain.triton_missing() or (toolchain.products_unsafe() if capability // 10 == 9 else None)
    if not why:
        return sys.executable, ""
    python = ENVIRONMENT / "bin" / "python"
    wanted = f"triton>={'.'.join(map(str, toolchain.PRODUCTS_KEPT))}"
    steps: Sequence[list[str]] = (
        [] if python.exists() else [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [str(python), "-m", "pip", "install", "-q", "--retries=1", "--no-deps", wanted],
    )
    print(f"{why}: {ENVIRONMENT.name} gets {wanted}", flush=True)
    for step in filter(None, steps):
        if run(step, without(os.environ, "PYTHONPATH")):
            return "", f"{why}, and {' '.join(step[-4:])} failed: see above"
    return str(python), ""


def without(variables: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


def run(command: Sequence[str], variables: Mapping[str, str]) -> int:
    print("$", *command, flush=True)
    return subprocess.run(command, cwd=ROOT, env=dict(variables)).returncode


def main(arguments: Sequence[str]) -> int:
    steps = {"native": native, "kernels": kernels}
    if len(arguments) != 1 or arguments[0] not in steps:
        raise SystemExit(f"got {list(arguments)}, expected one of {', '.join(steps)}")
    wrong = steps[arguments[0]]()
    if wrong:
        print(wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
