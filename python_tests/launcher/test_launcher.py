"""The launcher of kernels compiled ahead of time (csrc/launcher), without a GPU: a stand-in is the driver."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import launches

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shlex.split(os.environ.get("CXX", "")) or ["c++"]


def compile_stub(folder: Path, *flags: str) -> Path:
    library = folder / "libcuda_stub.so"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", f"-I{CSRC}", *flags]
    subprocess.run([*COMPILER, *options, str(CSRC / "tests" / "cuda_stub.cpp"), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_stub(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="session")
def native() -> str:
    spec = importlib.util.find_spec("rpsft_kernels._native")
    assert spec is not None and spec.origin is not None, "the package is installed without its compiled module"
    return spec.origin


def run(*arguments: str | Path, driver: str | Path) -> str:
    """Run a fresh interpreter, because the driver is chosen once per process; returns what it prints."""
    environment = {**os.environ, "RPSFT_CUDA_DRIVER": str(driver)}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("promise", launches.PROMISES)
def test_promise(promise: str, native: str, stub: Path) -> None:
    run(launches.__file__, promise, native, stub, driver=stub)


PRINT_FAILURE = """
import sys
sys.path.insert(0, sys.argv[1])
from launches import load, message
cuda = load(sys.argv[2]).cuda
kernel = cuda.Kernel(b"entry", "entry", "name", 128, 0, [])
kernel.launch(0, 0, (0, 1, 1), [])
print(message(RuntimeError, kernel.launch, 0, 0, (1, 1, 1), []))
print(message(RuntimeError, cuda.device_count))
"""


def failures(native: str, driver: str | Path) -> list[str]:
    lines = run("-c", PRINT_FAILURE, Path(launches.__file__).parent, native, driver=driver).splitlines()
    assert len(lines) == 2
    return lines


def test_a_driver_that_is_not_there(native: str, tmp_path: Path) -> None:
    path = tmp_path / "libcuda.so.1"
    for line in failures(native, path):
        assert line.startswith(f"no CUDA driver: '{path}' does not open (")
        assert "NVIDIA's GPU driver" in line and "RPSFT_CUDA_DRIVER" in line


def test_a_driver_that_lacks_a_function(native: str, tmp_path: Path) -> None:
    library = compile_stub(tmp_path, "-DSTUB_WITHOUT_LAUNCH")
    for line in failures(native, library):
        assert line.startswith(f"no CUDA driver: '{library}' has no function cuLaunchKernel")


IMPORT_THEN_OPEN = """
import os, sys
import rpsft_kernels, rpsft_kernels.ops
from rpsft_kernels import _native
_native.cuda.Kernel(b"entry", "entry", "name", 128, 0, [(0, 8)]).launch(0, 0, (0, 1, 1), [1])
try:
    _native.cuda.driver_version()
except RuntimeError as error:
    print(error)
os.environ["RPSFT_CUDA_DRIVER"] = sys.argv[1]
print(_native.cuda.driver_version(), _native.cuda.device_name(1))
"""


def test_importing_needs_no_driver(stub: Path, tmp_path: Path) -> None:
    """None is opened either: the first that opens is the one of the process, and it is named after the import."""
    missing, found = run("-c", IMPORT_THEN_OPEN, stub, driver=tmp_path / "none").splitlines()
    assert missing.startswith("no CUDA driver") and found == "12040 Stub GPU 1"


def test_declarations_are_the_drivers_own() -> None:
    """Triton's package carries CUDA's header."""
    spec = importlib.util.find_spec("triton")
    header = Path(spec.origin).parent / "backends/nvidia/include/cuda.h" if spec and spec.origin else Path("cuda.h")
    if not header.exists():
        pytest.skip("no cuda.h here: Triton is not installed, or without its NVIDIA backend")
    options = ["-std=c++17", "-fsyntax-only", f"-I{CSRC}", "-isystem", str(header.parent)]
    done = subprocess.run(
        [*COMPILER, *options, str(CSRC / "tests" / "cuda_header.cpp")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
